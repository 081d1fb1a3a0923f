"""Runs that are killed at any moment, or asked to stop, and are started again."""

import itertools
import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from dilaff_jax.runtime import checkpoint
from tests import progress
from tests.reliability import runs
from tests.reliability.runs import options, wait_for
from tests.running import assert_bit_identical, finish, lines, saved, start

LAST = runs.OPTIONS["num_steps"]
# When a process is killed: the time since it was started, as a share of what the starting takes;
# or what it has just done, for the how-manieth time, and how long after that, seconds.
EVENTS = ("starting", "started", "line", "saving", "saved", "deleting", "evaluating")


def run(data_dir, workdir, **changes):
    # TensorBoard's writer imports torch where it is installed; that would be a third of each life.
    shadow = data_dir / "no_torch" / "torch.py"
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("raise ImportError\n")
    return start(
        data_dir, workdir, *options(**changes), devices=1,
        stdout=subprocess.DEVNULL, environment={"PYTHONPATH": str(shadow.parent)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    """A run from start to end, in a process of its own, which also fills the compilation cache."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert progress.wait(run(data_dir, workdir)) == 0
    return workdir


def moment(kill):
    """(event, count, share): each event in turn, the rest by chance; fixed by the kill's number."""
    rng = random.Random(kill)
    return EVENTS[kill % len(EVENTS)], rng.randrange(1, 4), rng.random()


class Life:
    """One process of a run, from its start to its death."""

    # Of "starting", how long it takes to come to the first step; known after the first time.
    seconds = 3.0

    def __init__(self, data_dir, workdir):
        self.workdir, self.before = workdir, starts(workdir)
        self.names = set(self._names())
        self.began = time.monotonic()
        self.process = run(data_dir, workdir)

    def reach(self, event, count, share):
        """Waits for a moment; False if the run ended before."""
        if event == "starting":
            until = self.began + share * Life.seconds
            return wait_for(lambda: time.monotonic() >= until, self.process)
        if not wait_for(lambda: len(starts(self.workdir)) > len(self.before), self.process):
            return False
        Life.seconds = time.monotonic() - self.began
        seen, length = 0, self._length()
        while event != "started" and seen < count:
            names, names_before = set(self._names()), self.names
            come, gone = names - names_before, names_before - names
            happened = {
                "line": self._length() > length,
                "saving": any("tmp" in name for name in come),
                "saved": any(name.isdigit() for name in come),
                "deleting": any(name.isdigit() for name in gone),
                "evaluating": any(name.startswith("evaluation") for name in come),
            }
            seen, self.names, length = seen + happened[event], names, self._length()
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        until = time.monotonic() + share * (0.5 if event == "started" else 0.03)
        return wait_for(lambda: time.monotonic() >= until, self.process)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def came_to_steps(self):
        return len(starts(self.workdir)) > len(self.before)

    def _length(self):
        path = self.workdir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _names(self):
        for name in ("checkpoints", "evaluation"):
            folder = self.workdir / name
            if folder.is_dir():
                for path in folder.iterdir():
                    yield path.name if name == "checkpoints" else f"evaluation {path.name}"


def starts(workdir):
    path = workdir / "starts.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def assert_sound(workdir, unbroken):
    """metrics.jsonl is the unbroken run's up to some point, behind the newest checkpoint.

    Only the line under way when the process was killed may be torn. A checkpoint is written before
    its step is evaluated: that evaluation is made up for.
    """
    expected = (unbroken / "metrics.jsonl").read_bytes()
    path = workdir / "metrics.jsonl"
    found = path.read_bytes() if path.exists() else b""
    assert expected.startswith(found)
    latest = checkpoint.latest_step(workdir) or 0
    lines = [(json.loads(line), line) for line in expected.splitlines(True)]
    needed = [
        line
        for content, line in lines
        if content["step"] < latest or (content["step"] == latest and "eval/images" not in content)
    ]
    assert found.startswith(b"".join(needed))


def tear(workdir, unbroken):
    """Adds the first half of the next line, as a machine that loses power may leave it."""
    path = workdir / "metrics.jsonl"
    found = path.read_bytes() if path.exists() else b""
    following = (unbroken / "metrics.jsonl").read_bytes()[len(found) :].split(b"\n")[0]
    path.write_bytes(found + following[: len(following) // 2])


@pytest.mark.slow
def test_a_run_survives_kills_at_any_moment(kills, unbroken, data_dir, tmp_path, record_property):
    """SIGKILL; every life goes on from the newest checkpoint, and each run ends bit-identical.

    One run after the other until the kills of this share are done: moments that a run does not come
    to, because too few steps are left, are waited for in the next.
    """
    survived, ended, life = 0, 0, None
    numbers = itertools.count()
    workdir = tmp_path / str(next(numbers))
    try:
        for event, count, share in map(moment, kills):
            while True:
                expected = checkpoint.latest_step(workdir) if workdir.exists() else None
                life = Life(data_dir, workdir)
                if life.reach(event, count, share):
                    life.kill()
                    break
                assert progress.wait(life.process) == 0, (event, count, share)
                assert_bit_identical(unbroken, workdir, LAST)
                ended, workdir = ended + 1, tmp_path / str(next(numbers))
            assert_sound(workdir, unbroken)
            if life.came_to_steps():
                assert json.loads(starts(workdir)[-1])["step"] == (expected or 0)
            tear(workdir, unbroken)
            survived += 1
        life = Life(data_dir, workdir)
        assert progress.wait(life.process) == 0
        assert_bit_identical(unbroken, workdir, LAST)
        left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
        assert not left, "what was being written when the process was killed is not cleared away"
    finally:
        if life is not None:
            life.kill()
        record_property("kills_tried", len(kills))
        record_property("kills_survived", survived)
        record_property("runs_finished_bit_identical", ended + 1)


@pytest.mark.slow
def test_sigterm_saves_the_step_under_way(unbroken, data_dir, tmp_path):
    """Without a checkpoint of its own in sight; the run then goes on to the same end."""
    process = start(data_dir, tmp_path, *options(checkpoint_every=1000), devices=1)
    metrics = tmp_path / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 4, process)
    # Held while it is looked at, so that which step is under way is known exactly.
    process.send_signal(signal.SIGSTOP)
    done = lines(tmp_path)[-1]["step"]
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    output = finish(process, 143)
    at = int(re.search(r"step (\d+) is saved", output).group(1))
    # Steps are logged after it is decided whether to stop behind them.
    assert at in (done + 1, done + 2)
    assert runs.steps(tmp_path) == [at]
    assert all(np.isfinite(value).all() for value in saved(tmp_path, at).values())
    assert progress.wait(run(data_dir, tmp_path)) == 0
    assert json.loads(starts(tmp_path)[-1])["step"] == at
    assert_bit_identical(unbroken, tmp_path, LAST)
