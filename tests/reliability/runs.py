"""What the tests of reliability share: a small run that saves often, and ways to look at it."""

import os
import pathlib
import time

from dilaff_jax.runtime import checkpoint
from tests import data_files, progress

# One device, and boundaries cost more than the network: what is tested here is around the numbers.
OPTIONS = {
    "parallel.devices": 1,
    "num_steps": 24,
    "log_every": 1,
    "checkpoint_every": 3,
    "eval_every": 9,
    "eval.boundaries": False,
    "eval.pictures": 0,
}


def options(**changes):
    """`OPTIONS` for the command line; changes with "__" for a dot."""
    found = OPTIONS | {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config.{key}={value}" for key, value in found.items()]


def configure(config, **changes):
    """`OPTIONS` for a config."""
    for key, value in (OPTIONS | {k.replace("__", "."): v for k, v in changes.items()}).items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part[name]
        part[last] = value
    return config


def data(tmp_path_factory):
    """Ten images to train on and three to evaluate."""
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=3)


def wait_for(condition, process):
    """Waits until `condition()`; False if the process ends before. Looks a thousand times a second."""
    watch, looked = progress.Watch(process), time.monotonic()
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > looked + 5:
            watch.look()
            looked = time.monotonic()
        time.sleep(0.001)
    return True


def steps(workdir):
    """The steps of all finished checkpoints."""
    folder = workdir / "checkpoints"
    latest = checkpoint.latest_step(workdir)
    found = {int(p.name) for p in folder.iterdir() if p.name.isdigit()} if latest else set()
    return sorted(step for step in found if step <= (latest or 0))


def copy_with(path, change):
    """Replaces a file's bytes by `change(bytes)`."""
    path.write_bytes(change(path.read_bytes()))


def flip(content, position):
    """One bit of the byte at `position` (a share of the length) flipped."""
    at = min(len(content) - 1, int(position * len(content)))
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def children(pid):
    """The processes that a process started, and those that they started."""
    found, open_ = [], [pid]
    while open_:
        parent = open_.pop()
        for path in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                started = [int(x) for x in path.read_text().split()]
            except OSError:  # the thread has ended
                continue
            found += started
            open_ += started
    return found


def alive(pid):
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def files_open():
    """What this process's file handles point to, without those of pipes and the like."""
    found = []
    for handle in pathlib.Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except OSError:  # that of the listing itself
            continue
    return sorted(found)
