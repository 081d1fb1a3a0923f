"""Waiting for other processes for as long as they get on, however busy the machine is."""

import os
import pathlib
import subprocess
import time

# Seconds in which a process that gets on uses at least some of a processor.
STALLED = 180
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """Of a process and of those that it started and waited for."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / _TICKS


class Watch:
    """Fails when a process has not used a processor for `STALLED` seconds."""

    def __init__(self, process):
        self._process, self._used, self._since = process, 0.0, time.monotonic()

    def look(self):
        used = cpu_seconds(self._process.pid)
        if used > self._used + 0.02:
            self._used, self._since = used, time.monotonic()
        if time.monotonic() - self._since > STALLED:
            self._process.kill()
            output = self._process.communicate()[0] if self._process.stdout else ""
            raise AssertionError(f"{self._process.args} does not get on:\n{output}")


def wait(process):
    """The exit status of a process."""
    watch = Watch(process)
    while True:
        try:
            return process.wait(5)
        except subprocess.TimeoutExpired:
            watch.look()


def output(process):
    """What a process printed until its end."""
    watch = Watch(process)
    while True:
        try:
            return process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            watch.look()
