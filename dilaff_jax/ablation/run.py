"""The whole of an ablation, read top to bottom."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dilaff_jax import locks, reporting, train
from dilaff_jax.ablation import (
    arms,
    candidates,
    colour,
    expense,
    outputs,
    scoring,
    selection,
    showcase,
    summary,
)
from dilaff_jax.ablation import config as ablation_config
from dilaff_jax.ablation.outputs import Outputs
from dilaff_jax.ablation.selection import Selected

ByArm = dict[str, list[Outputs]]


def ablate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains what is not trained, selects, evaluates; writes and returns `ablation.json`.

    Stopped at any moment and started again, it goes on where it was. Started several times at
    once, on one machine or on a disk that all see, the processes share the training.

    Raises:
        ValueError: the config cannot be; a folder holds a run of another config.
        Preempted: the process was asked to stop; what is done is kept.
    """
    train.check(config)
    ablation_config.check(config)
    candidates.grid(config.ablate.grid.to_dict())  # said before anything is trained
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes: an ablation runs in one. Train its runs as ordinary "
            "runs in WORKDIR/ARM/seed-N with several, then start it with one"
        )
    with stopping_cleanly(workdir) as training:
        todo = arms.runs(config, workdir)
        arms.train_all(todo, training)
        # Of several processes that shared the training, one goes through what follows at a time;
        # the others find its results kept.
        with locks.held(workdir / "analysis.lock", wait=True):
            result = _analyse(Study(config, todo), workdir)
    return result


def _analyse(study: "Study", workdir: pathlib.Path) -> dict[str, Any]:
    started = time.perf_counter()
    with colour.pool(study.config.ablate.processes) as executor:
        study.select(executor)
        study.count(executor)
        drawn = showcase.draw(study, workdir / "pictures", executor)
    costs = expense.measure(study, workdir)
    result = summary.make(study, costs, drawn, time.perf_counter() - started)
    write(workdir / "ablation.json", result)
    print(table(result))
    _render(workdir)
    return result


class Study:
    """What is known so far.

    Attributes:
        config: the whole config.
        runs: the trained runs, by arm in the order of the seeds.
        chosen_on: outputs on the selection split, likewise.
        reported: outputs on the report split, likewise.
        bias: of each run of "joint", `[D]`, fitted on the selection split.
        selected: what was chosen: "refined", "baseline+dense_crf", ...
        missing: {rival: why it could not be run}.
        variants: what is reported.
        counts: {variant: counts by image, by seed}.
        edges: histograms of affinity on the report split, by seed.
    """

    def __init__(self, config: ml_collections.ConfigDict, runs: list[arms.Run]) -> None:
        self.config = config
        self.runs: dict[str, list[arms.Run]] = {}
        for run in runs:
            self.runs.setdefault(run.arm, []).append(run)
        self.chosen_on = self._outputs(config.ablate.selection_split)
        self.reported = self._outputs(config.ablate.report_split)
        self.bias: list[np.ndarray] = []
        self.selected: dict[str, Selected] = {}
        self.missing = colour.missing(list(config.ablate.rivals))
        self.variants: list[scoring.Variant] = []
        self.counts: dict[str, list[dict[str, np.ndarray]]] = {}
        self.edges: list[dict[str, np.ndarray]] = []

    @property
    def rows(self) -> int:
        """Images at a time."""
        return self.config.eval.batch_size

    @property
    def source(self) -> Any:
        """The report split."""
        return next(iter(self.reported.values()))[0].source

    def select(self, executor: colour.Pool) -> None:
        """Fits biases and chooses operator and rivals, on the selection split alone."""
        ablate, tolerance = self.config.ablate, self.config.eval.tolerance
        if "refined" in ablate.arms:
            grid = candidates.grid(ablate.grid.to_dict())
            self.bias = [selection.fit_bias(o, self.rows) for o in self.chosen_on["joint"]]
            scores = [
                selection.sweep(o, grid, bias, self.rows, tolerance)
                for o, bias in zip(self.chosen_on["joint"], self.bias, strict=True)
            ]
            images = len(self.chosen_on["joint"][0])
            self._choose("refined", grid, scores, images)
        for arm in [a for a in ("baseline", "joint") if a in self.runs]:
            for rival in [r for r in ablate.rivals if r not in self.missing]:
                grid = candidates.grid({rival: ablate.rivals[rival].to_dict()})
                some = selection.some_images(self.chosen_on[arm][0], ablate.rival_images)
                scores = [
                    selection.sweep_rival(o, rival, grid, some, tolerance, executor)
                    for o in self.chosen_on[arm]
                ]
                self._choose(f"{arm}+{rival}", grid, scores, len(some))
        for rival, why in self.missing.items():
            tqdm.write(f"{rival} is left out: it {why}")

    def count(self, executor: colour.Pool) -> None:
        """Counts every variant on every image of the report split."""
        tolerance = self.config.eval.tolerance
        self.variants = scoring.variants(self.config.ablate.arms, self.selected)
        plain = {
            arm: [scoring.plain_maps(o, self.rows) for o in found]
            for arm, found in self.reported.items()
        }
        for variant in self.variants:
            self.counts[variant.name] = []
            for i, found in enumerate(self.reported[variant.arm]):
                about: dict[str, Any] = {"after": None}
                maps: Any = enumerate(plain[variant.arm][i])
                if variant.after is not None:
                    bias = self.bias[i] if variant.name == "refined" else None
                    maps = scoring.maps_after(found, variant.after, bias, self.rows, executor)
                    about = {
                        "after": dataclasses.asdict(variant.after),
                        "bias": None if bias is None else bias.tolist(),
                    }
                self.counts[variant.name].append(
                    scoring.count(found, variant, about, plain[variant.arm][i], maps, tolerance)
                )
        if "joint" in self.runs:
            self.edges = [candidates.edge_histograms(o, self.rows) for o in self.reported["joint"]]

    def _choose(
        self, name: str, grid: list[candidates.Candidate], scores: list[Any], images: int
    ) -> None:
        found = selection.choose(grid, scores, self.config.ablate.criterion, images)
        self.selected[name] = found
        tqdm.write(f"selected for {name}: {found.chosen} of {len(grid)} candidates")

    def _outputs(self, split: str) -> ByArm:
        return {a: [outputs.compute(r, split) for r in runs] for a, runs in self.runs.items()}


def table(result: dict[str, Any]) -> str:
    """The main figures, in per cent."""
    figures = {"miou": "mean IoU", "boundary_iou": "boundary IoU", "boundary_f": "boundary F"}

    def said(variant: dict[str, Any], name: str) -> str:
        found = variant["figures"].get(name)
        if found is None:
            return "-"
        spread = "" if found["std"] is None else f" ± {100 * found['std']:.2f}"
        return f"{100 * found['mean']:.2f}{spread}"

    rows = [[v["title"], *(said(v, name) for name in figures)] for v in result["variants"].values()]
    split = result["splits"]["report"]
    title = f"{split['title']}: {split['images']} images, {len(result['seeds'])} seeds, per cent"
    return reporting.table(title, ["", *figures.values()], rows)


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, at once, and says where."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(result, indent=None, separators=(",", ":"), allow_nan=False) + "\n")
    part.replace(path)
    print(f"written: {path}")


def _render(workdir: pathlib.Path) -> None:
    """Writes the page, where what draws it is installed."""
    absent = [name for name in ("jinja2", "matplotlib") if not importlib.util.find_spec(name)]
    if absent:
        print(
            f"no page: {' and '.join(absent)} not installed; pip install 'dilaff-jax[report]', "
            f"then python -m dilaff_jax.report {workdir}"
        )
        return
    from dilaff_jax import report

    print(f"written: {report.write(workdir)}")


@contextlib.contextmanager
def stopping_cleanly(workdir: pathlib.Path) -> Iterator[Callable[[bool], None]]:
    """Makes a request to stop an exception; the value says whether a run trains.

    A run that trains saves its step first, by a handler of its own. Until it listens, threads of
    its data and checkpoints are being started and must not be torn down midway: the request is
    made again every second until it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: None
        return
    training, asked, again = False, False, None
    message = f"asked to stop: what is done is kept in {workdir}; run again to go on"

    def tell(now: bool) -> None:
        nonlocal training
        training = now
        if asked and not now:
            raise train.Preempted(message)

    def stop(*_: object) -> None:
        nonlocal asked, again
        asked = True
        if not training:
            raise train.Preempted(message)
        again = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield tell
    finally:
        if again is not None:
            again.cancel()
        signal.signal(signal.SIGTERM, before)
