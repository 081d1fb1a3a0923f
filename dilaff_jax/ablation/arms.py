"""The trained arms: their configs, and training what is not trained yet."""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections
from tqdm import tqdm

from dilaff_jax import evaluate, resume, train
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import checkpoint, locks
from dilaff_jax.storage import mirror

# Of a run: what it was trained with, for how long, and how far.
_TOLD = re.compile(
    r"config\.json|seconds\.json|checkpoints/\d+/_CHECKPOINT_METADATA|evaluation/\d+/results\.json"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed; `config` is that of an ordinary training run in `home`."""

    arm: str
    seed: int
    config: ml_collections.ConfigDict
    home: str | pathlib.Path  # a folder, or one of a bucket

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def workdir(self) -> pathlib.Path:
        """`home` on this disk; of a bucket, what is told of the run there now, without weights."""
        return mirror.some(self.home, "the workdir", _TOLD)

    @property
    def complete(self) -> bool:
        """Whether its last step is saved and evaluated."""
        last, workdir = self.config.num_steps, self.workdir
        saved = checkpoint.latest_step(workdir) == last
        return saved and evaluate.read_results(workdir, last) is not None


def runs(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> list[Run]:
    """The runs of `config.ablate`, all arms of one seed before the next seed.

    So a comparison is complete for the first seeds while the last are not trained.
    """
    arms = [arm for arm in config.ablate.arms if arm != "refined"]
    return [
        Run(arm, seed, arm_config(config, arm, seed), home(workdir, arm, seed))
        for seed in config.ablate.seeds
        for arm in arms
    ]


def home(workdir: str | os.PathLike, name: str, seed: int) -> str | pathlib.Path:
    """Where the run of this name and seed is trained, below the workdir of the whole."""
    return mirror.below(workdir, name, f"seed-{seed}")


def arm_config(config: ml_collections.ConfigDict, arm: str, seed: int) -> ml_collections.ConfigDict:
    """The training config of one arm and seed.

    Evaluated once, at the end, on the selection split (the report split where nothing is selected:
    `ablate.grid` is {}): the last state is taken, as choosing among states would favour the arm
    whose score is noisier.
    """
    result = copy.deepcopy(config)
    result.seed = seed
    ablate = config.ablate
    result.data.eval_split = ablate.selection_split if ablate.grid else ablate.report_split
    result.eval_every = config.num_steps
    if arm != "joint":
        with result.ignore_type():
            result.loss.update({"affinity": 0.0, "refined": 0.0})
            result.loss.aaf = config.ablate.aaf if arm == "aaf" else 0.0
    return result


def train_all(todo: Sequence[Run], training: Callable[[bool], None] = lambda _: None) -> None:
    """Trains or resumes what is not complete, one run after the other.

    Several processes may share the work, on one machine, on a disk that all see, or in a bucket:
    each takes the next run that no other holds, and waits at the end for those that others hold.

    Args:
        todo: the runs, in their order.
        training: is told when a run begins (True) and ends.

    Raises:
        UserError: a run's folder holds a run with another config.
        Preempted: as `train.train_and_evaluate`.
    """
    for run in todo:
        check_folder(run)
    clock, left = Clock(todo), list(todo)
    while left:
        for run in list(left):
            with contextlib.suppress(locks.Taken):
                _train(run, clock, todo, training)
                left.remove(run)
        # What is left is trained by others; the first of it is waited for.
        if left:
            train.wait(left[0].home)


def _train(run: Run, clock: "Clock", todo: Sequence[Run], training: Callable[[bool], None]) -> None:
    title = f"== {todo.index(run) + 1} of {len(todo)}: {run}"
    if run.complete:
        tqdm.write(f"{title}: trained ==")
        return
    tqdm.write(f"{title}; {clock.left([r for r in todo if not r.complete])} ==")
    started = time.perf_counter()
    training(True)
    ours = True
    try:
        train.train_and_evaluate(run.config, run.home)
    except locks.Taken:
        ours = False
        tqdm.write(f"{title}: another process trains it ==")
        training(False)
        raise
    finally:
        if ours:
            clock.add(run, time.perf_counter() - started)
        # Arms are other programs; what the last one compiled and held is of no use.
        jax.clear_caches()
        gc.collect()
    training(False)


def check_folder(run: Run) -> None:
    """Raises UserError if `run.home` was trained with a config that gives other weights."""
    lines = resume.differences(run.config, run.workdir)
    if lines:
        raise UserError(
            f"{run.home} holds a run with another config:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nuse the config it was trained with, move it away, or use another workdir"
        )


@contextlib.contextmanager
def analysing(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The folder of all runs, on this disk, for one process at a time.

    Of several that shared the training the others wait, and find its results kept.
    """
    with (
        mirror.written(workdir, "the workdir", alone=True, wait=True) as folder,
        locks.held(folder / "analysis.lock", wait=True),
    ):
        yield folder


class Clock:
    """Seconds spent on each run, over all calls; says how long the rest will take."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    @property
    def seconds(self) -> dict[str, float]:
        """Of every run that was begun, as its folder has it."""
        found = {str(run): _seconds(run) for run in self._runs}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    def add(self, run: Run, seconds: float) -> None:
        """Adds the time of one call."""
        total = (_seconds(run) or 0.0) + seconds
        mirror.write_text(mirror.below(run.home, "seconds.json"), json.dumps(total) + "\n")

    def left(self, todo: Sequence[Run]) -> str:
        """Such as "about 35 min left"; from the mean over what was trained, by arm if it can."""
        seconds = self.seconds
        done = {name: s for name, s in seconds.items() if name not in map(str, todo)}
        if not done:
            return "time left unknown until one is trained"
        total = 0.0
        for run in todo:
            of_arm = [s for name, s in done.items() if name.startswith(f"{run.arm},")]
            known = of_arm or list(done.values())
            total += max(0.0, sum(known) / len(known) - seconds.get(str(run), 0.0))
        return f"about {max(1, round(total / 60))} min of training left"


def _seconds(run: Run) -> float | None:
    """Spent on a run so far; None where it was not begun."""
    path = run.workdir / "seconds.json"
    return float(json.loads(path.read_text())) if path.exists() else None
