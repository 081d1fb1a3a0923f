"""The trained arms: their configs, and training what is not trained yet."""

import contextlib
import copy
import dataclasses
import gc
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from tqdm import tqdm

from dilaff_jax import schema, settings, train
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import checkpoint, files, locks

# Parts of a config that do not decide which weights a run ends with.
FREE = (
    *("ablate", "eval", "inference", "refine", "parallel", "profile_steps", "best_metric"),
    *("keep_latest", "log_every", "eval_every", "checkpoint_every"),
    *("data.data_dir", "data.eval_split", "data.eval_size"),
    *("data.workers", "data.prefetch", "data.cache"),
)
# Sections of a config that decide which weights a run ends with.
_DECIDING = ("data", "model", "loss", "optim", "init")
# These decide nothing either where no loss trains an affinity head.
OF_THE_HEAD = (
    *("model.affinity", "loss.affinity_loss", "loss.affinity_options"),
    *("loss.affinity_class_weights", "loss.soft_targets"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed; `config` is that of an ordinary training run in `workdir`."""

    arm: str
    seed: int
    config: ml_collections.ConfigDict
    workdir: pathlib.Path

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def complete(self) -> bool:
        """Whether its last step is saved."""
        return checkpoint.latest_step(self.workdir) == self.config.num_steps


def runs(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Run]:
    """The runs of `config.ablate`, all arms of one seed before the next seed.

    So a comparison is complete for the first seeds while the last are not trained.
    """
    arms = [arm for arm in config.ablate.arms if arm != "refined"]
    return [
        Run(arm, seed, arm_config(config, arm, seed), workdir / arm / f"seed-{seed}")
        for seed in config.ablate.seeds
        for arm in arms
    ]


def arm_config(config: ml_collections.ConfigDict, arm: str, seed: int) -> ml_collections.ConfigDict:
    """The training config of one arm and seed.

    Evaluated once, at the end, on the selection split: the last state is taken, as choosing among
    states would favour the arm whose score is noisier.
    """
    result = copy.deepcopy(config)
    result.seed = seed
    result.data.eval_split = config.ablate.selection_split
    result.eval_every = config.num_steps
    if arm != "joint":
        with result.ignore_type():
            result.loss.update({"affinity": 0.0, "refined": 0.0})
            result.loss.aaf = config.ablate.aaf if arm == "aaf" else 0.0
    return result


def train_all(todo: Sequence[Run], training: Callable[[bool], None] = lambda _: None) -> None:
    """Trains or resumes what is not complete, one run after the other.

    Several processes may share the work, on one machine or on a disk that all see: each takes the
    next run that no other holds, and waits at the end for those that others hold.

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
            with contextlib.suppress(train.Busy):
                _train(run, clock, todo, training)
                left.remove(run)
        # What is left is trained by others; the first of it is waited for.
        if left:
            with locks.held(train.lock_file(left[0].workdir), wait=True):
                pass


def _train(run: Run, clock: "Clock", todo: Sequence[Run], training: Callable[[bool], None]) -> None:
    title = f"== {todo.index(run) + 1} of {len(todo)}: {run}"
    if run.complete:
        tqdm.write(f"{title}: trained ==")
        return
    tqdm.write(f"{title}; {clock.left([r for r in todo if not r.complete])} ==")
    started = time.perf_counter()
    training(True)
    try:
        train.train_and_evaluate(run.config, run.workdir)
    except train.Busy:
        tqdm.write(f"{title}: another process trains it ==")
        training(False)
        raise
    finally:
        clock.add(run, time.perf_counter() - started)
        # Arms are other programs; what the last one compiled and held is of no use.
        jax.clear_caches()
        gc.collect()
    training(False)


def check_folder(run: Run) -> None:
    """Raises UserError if `run.workdir` was trained with a config that gives other weights."""
    path = run.workdir / "config.json"
    if not path.exists():
        return
    trained, wanted = deciding(json.loads(path.read_text())), deciding(as_json(run.config))
    # What a run was trained before was at its default then: every option defaults to what was.
    defaults = _defaults()
    trained |= {k: defaults[k] for k in wanted.keys() & defaults.keys() - trained.keys()}
    unknown = sorted(wanted.keys() - trained.keys())
    if unknown:
        logging.warning(
            "%s was trained before there was %s; taken to be as in this config", path, unknown
        )
    differing = [k for k in sorted(trained) if k in wanted and trained[k] != wanted[k]]
    differing += sorted(trained.keys() - wanted.keys())
    if differing:
        lines = [
            f"  {k}: found {trained[k]!r}, wanted {wanted.get(k, 'no such key')!r}"
            for k in differing
        ]
        raise UserError(
            f"{run.workdir} holds a run with another config:\n" + "\n".join(lines) + "\nuse the "
            "config it was trained with, move it away, or use another workdir"
        )


def as_json(config: ml_collections.ConfigDict) -> Any:
    """The config as config.json holds it."""
    return json.loads(config.to_json_best_effort())


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a config.json, without what does not decide a run's weights."""
    flat = _flat(config)
    loss = config.get("loss", {})
    headless = not loss.get("affinity") and not loss.get("refined")
    # Training through the propagation makes its operator part of the training.
    free = [k for k in FREE if not (k == "refine" and loss.get("refined"))]
    free += OF_THE_HEAD if headless else ()
    return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f + ".") for f in free)}


def _defaults() -> dict[str, Any]:
    """{dotted key: default} of the parts that decide a run's weights, as `deciding` has them."""
    parts = {name: schema.defaults(settings.SECTIONS[name]) for name in _DECIDING}
    return _flat(as_json(ml_collections.ConfigDict(parts)))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    parts = ((f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items())
    return {k: v for name, value in parts for k, v in _flat(value, name).items()}


class Clock:
    """Seconds spent on each run, over all calls; says how long the rest will take."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    @property
    def seconds(self) -> dict[str, float]:
        """Of every run that was begun, as its folder has it."""
        paths = {str(run): run.workdir / "seconds.json" for run in self._runs}
        return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}

    def add(self, run: Run, seconds: float) -> None:
        """Adds the time of one call."""
        path = run.workdir / "seconds.json"
        files.write_text(path, json.dumps(self.seconds.get(str(run), 0.0) + seconds) + "\n")

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
