"""Evaluation: every image once, with and without refinement in the same pass.

Devices return sums of counts and label maps; what needs distances to boundaries is counted on the
host. Counts are added over batches, devices and processes first and turned into figures once.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dilaff_jax import metrics, settings, visualize
from dilaff_jax.data import datasets, pipeline
from dilaff_jax.eval_step import PLAIN, REFINED, EvalStep
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import checkpoint, files, reporting
from dilaff_jax.runtime import refinement as refinement_lib
from dilaff_jax.runtime.parallel import AXIS, Devices, sum_over_processes
from dilaff_jax.storage import mirror

_RESULTS = "results.json"
# Of mean IoU, from which on propagation is said to do harm. (Our choice.)
_HARM = 0.002
# Holds a character for each time that the evaluation was begun.
_BEGUN = "begun"


@dataclasses.dataclass
class Results:
    """One evaluation.

    Attributes:
        step: of the state that was evaluated.
        scalars: {name: value}, such as "refined/miou"; shares in [0, 1].
        table: the main figures, for reading.
        pictures: {name: RGB uint8 `[H, W, 3]`}.
        counts: that the figures follow from; {} of results that were read.
    """

    step: int
    scalars: dict[str, float]
    table: str
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def advice(self) -> str:
        """A line where propagation, as it is set, lowers mean IoU; "" where it does not."""
        plain, refined = (self.scalars.get(f"{v}/miou", math.nan) for v in (PLAIN, REFINED))
        if not refined < plain - _HARM:
            return ""
        return (
            "propagation, as config.refine has it, lowers mean IoU by "
            f"{100 * (plain - refined):.1f} points: --mode fit chooses one on images that were not "
            "trained on"
        )

    @property
    def text(self) -> str:
        """The table, and below it what to do where there is something."""
        return "\n".join(filter(None, (self.table, self.advice)))

    def report(self, reporter: reporting.Reporter) -> None:
        """Writes figures and pictures where those of training are, and prints the table."""
        reporter.scalars(self.step, {f"eval/{k}": v for k, v in self.scalars.items()})
        reporter.pictures(self.step, self.pictures)
        reporter.say(self.text)


class Evaluation:
    """Evaluates states of one run.

    Args:
        config: the whole config.
        model: a `Segmenter`.
        devices: on which the batches are spread.
        workdir: results go to `workdir/evaluation/STEP`.
        source: what is evaluated; opened once, so that what it keeps in memory stays there from one
            evaluation to the next.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: segmenter.Segmenter,
        devices: Devices,
        workdir: pathlib.Path,
        source: datasets.Source,
    ) -> None:
        self._config, self._devices, self._workdir = config, devices, workdir
        self._source = source
        self._step = EvalStep(config, model, self._source.num_classes)
        self.variants = self._step.variants
        self._program = devices.map(self._step, out=("replicated", "sharded"))
        # Of this start, the same in all processes, of which one writes them to a disk.
        self._scores: dict[int, float | None] = {}

    def prepare(self, step: int) -> None:
        """Removes what earlier evaluations of this step left; results.json is the sign of an end.

        Raises:
            OSError: it cannot be removed.
        """
        if jax.process_index() == 0:
            for name in (_RESULTS, _BEGUN):
                (result_folder(self._workdir, step) / name).unlink(missing_ok=True)

    def begun(self, step: int) -> int:
        """How often this step's evaluation was begun since `prepare`."""
        path = result_folder(self._workdir, step) / _BEGUN
        return len(path.read_text()) if path.exists() else 0

    def __call__(self, variables: Mapping[str, Any], step: int) -> Results:
        """Evaluates one state; process 0 writes pictures. `finish` is to follow."""
        folder = result_folder(self._workdir, step)
        if jax.process_index() == 0:
            files.write_text(folder / _BEGUN, "x" * (self.begun(step) + 1))
        device_counts, host_counts, drawn = self._count(variables, folder)
        counts = sum_over_processes({"device": device_counts, "host": host_counts})
        scalars = self._summary(counts["device"], counts["host"])
        if jax.process_index() == 0:
            visualize.write(folder / "pictures", drawn)
        results = Results(step, scalars, self._table(scalars), drawn, counts)
        self._scores[step] = self.score(results)
        return results

    def finish(self, results: Results) -> None:
        """Writes results.json, by which an evaluation is known to have come to its end."""
        if jax.process_index() == 0:
            folder = result_folder(self._workdir, results.step)
            _write_results(folder, results)
            (folder / _BEGUN).unlink(missing_ok=True)

    def score(self, results: Results | None) -> float | None:
        """What marks the best state: `config.best_metric`, refined where there is refinement.

        None where it is undefined: for a class or a boundary that no image has.
        """
        name = self._config.best_metric
        if not name.startswith("affinity/"):
            name = f"{self.variants[-1]}/{name}"
        value = None if results is None else results.scalars.get(name)
        return None if value is None or math.isnan(value) else value

    def has_waited(self, patience: int, at: int) -> bool:
        """Whether the last `patience` scores up to step `at` are no better than one before; 0: no.

        An evaluation that failed, or whose score is undefined, does not count.
        """
        found = dict(self._scores)
        for step in set(evaluated_steps(self._workdir)) - found.keys():  # of an earlier start
            found[step] = self.score(read_results(self._workdir, step))
        scores = [s for step, s in sorted(found.items()) if step <= at and s is not None]
        return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])

    def _count(
        self, variables: Mapping[str, Any], folder: pathlib.Path
    ) -> tuple[Any, Any, dict[str, np.ndarray]]:
        """Goes through this process's images once."""
        settings, devices = self._config.eval, self._devices
        # Padding rows cost time, not accuracy.
        batch_size = -(-settings.batch_size // devices.total) * devices.total
        batches = pipeline.eval_batches(
            self._config.data,
            self._source,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            unit=devices.total,
        )
        placed = devices.place(dict(variables))
        device_counts: Any = None
        host_counts = [self._host_counts(_blank(self.variants, self._source.ndim))]
        drawn: dict[str, np.ndarray] = {}
        quiet = jax.process_index() > 0
        with batches, concurrent.futures.ThreadPoolExecutor() as pool:
            for batch in tqdm(batches, desc="evaluating", leave=False, disable=quiet):
                on_device = {k: batch[k] for k in ("image", "label")}
                summed, result = self._program(placed, devices.shard(on_device))
                counts = jax.device_get(summed)
                # The counts are of all devices of all processes, so one process keeps them.
                counts = jax.tree.map(lambda x: x * (not quiet), counts)
                device_counts = metrics.add(counts, *([device_counts] if device_counts else []))
                maps = {k: devices.local_rows(v) for k, v in result["labels"].items()}
                edges = devices.local_rows(result["edges"])
                rows = np.flatnonzero(batch["mask"])
                views = [visualize.view(batch, maps, edges, int(row)) for row in rows]
                host_counts += pool.map(self._host_counts, views)
                for view in views:
                    name = self._source.names[view.index]
                    if settings.predictions:
                        visualize.write_predictions(folder / "predictions", name, view.predictions)
                    if view.index < settings.pictures:
                        source = self._source
                        flat = visualize.flat(view, source.slice_of, source.picture)
                        drawn[name] = visualize.strip(flat, source.colors)
        return device_counts, metrics.add(*host_counts), drawn

    def _host_counts(self, view: visualize.View) -> dict[str, Any]:
        """Counts of one image that need its boundaries, in the form of `_summary`."""
        settings, classes, truth = self._config.eval, self._source.num_classes, view.label
        counts: dict[str, Any] = {"images": np.asarray(int(view.index >= 0))}
        if REFINED in self.variants:
            before, after = (view.predictions[name] for name in (PLAIN, REFINED))
            counts["transitions"] = metrics.transitions(before, after, truth, classes)
        for name in self.variants if settings.boundaries else ():
            prediction = view.predictions[name]
            counts[name] = metrics.boundary_counts(prediction, truth, classes, settings.tolerance)
            if self._source.spacings is not None:
                spacing = self._source.spacings[view.index]
                of_surfaces = metrics.surfaces(
                    prediction, truth, classes, spacing, settings.surface_tolerance
                )
                counts[name]["surfaces"] = of_surfaces
        return counts

    def _summary(self, device: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, float]:
        """Figures from counts: VARIANT/..., affinity/..., transitions/..., images."""
        names = self._source.class_names
        groups: dict[str, dict[str, float]] = {}
        for variant in self.variants:
            groups[variant] = metrics.segmentation_summary(device[variant], names)
            of_host = dict(host.get(variant, {}))
            if "surfaces" in of_host:
                groups[variant] |= metrics.surface_summary(of_host.pop("surfaces"), names)
            groups[variant] |= metrics.boundary_summary(**of_host)
        if "affinity" in device:
            groups["affinity"] = metrics.affinity_summary(device["affinity"], self._step.dilations)
        if REFINED in self.variants:
            groups["transitions"] = metrics.transition_summary(
                host["transitions"], class_names=names
            )
        flat = {f"{group}/{k}": v for group, figures in groups.items() for k, v in figures.items()}
        return {"images": float(host["images"]), **flat}

    def _table(self, scalars: Mapping[str, float]) -> str:
        """Per-class IoU and the main figures of each variant, in per cent."""

        def row(name: str, key: str, factor: float = 100) -> list[str]:
            values = [scalars.get(f"{v}/{key}") for v in self.variants]
            return [name, *("-" if x is None else f"{factor * x:.2f}" for x in values)]

        what = "images" if self._source.ndim == 2 else "volumes"
        title = f"{self._source.title}: {scalars['images']:.0f} {what}, per cent"
        if not self.variants:
            return self._edge_table(scalars, title)
        rows = [row(name, f"iou/{name}") for name in self._source.class_names]
        main = {
            "miou": "mean IoU",
            "pixel_accuracy": "pixel accuracy",
            "mean_accuracy": "mean accuracy",
            "boundary_iou": "boundary IoU",
            "boundary_f": f"boundary F, {self._config.eval.tolerance:g} px",
        }
        if self._source.ndim == 3:
            at = f"{self._config.eval.surface_tolerance:g} mm"
            main |= {"dice": "Dice", "surface_dice": f"surface Dice, {at}"}
        rows += [row(title, key) for key, title in main.items() if f"{PLAIN}/{key}" in scalars]
        if f"{PLAIN}/hausdorff" in scalars:
            rows.append(row("95 % Hausdorff distance, mm", "hausdorff", factor=1))
        return reporting.table(title, ["", *self.variants], rows)

    def _edge_table(self, scalars: Mapping[str, float], title: str) -> str:
        """How well class edges are found at each dilation, in per cent."""
        rows = []
        for figure in ("average_precision", "precision", "recall", "f1", "calibration_error"):
            names = [f"affinity/d{d}/{figure}" for d in self._step.dilations]
            values = [scalars.get(name) for name in names]
            texts = ["-" if x is None else f"{100 * x:.2f}" for x in values]
            rows.append([figure.replace("_", " "), *texts])
        columns = [f"dilation {d}" for d in self._step.dilations]
        return reporting.table(f"class edges of {title}", ["", *columns], rows)


def evaluate_run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    refinement: refinement_lib.Use = "fitted",
) -> Results:
    """Evaluates the best state of a run (the latest, if none was evaluated), prints the table.

    Args:
        config: the whole config.
        workdir: of the run.
        refinement: which is evaluated, see `runtime.refinement.chosen`.

    Raises:
        FileNotFoundError: `workdir` holds no checkpoint.
        UserError: the checkpoint is of another model than `config` describes.
    """
    settings.check(config)
    with mirror.written(workdir, "the workdir", kind="results") as folder:
        return _evaluate_run(config, folder, refinement)


def _evaluate_run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, refinement: refinement_lib.Use
) -> Results:
    config = datasets.completed(config)
    devices = Devices.of(config.parallel)
    source = datasets.load(config.data, config.data.eval_split)
    model = segmenter.build(segmenter.config_of_run(config), source.num_classes, axis_name=AXIS)
    like = segmenter.abstract_variables(model, config.data.crop_size)
    step, variables = checkpoint.read_variables(workdir, like)
    refine = refinement_lib.chosen(workdir, config.refine, step, refinement)
    if refine != dict(config.refine):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.refine = ml_collections.ConfigDict(refine)
    evaluation = Evaluation(config, model, devices, workdir, source)
    results = evaluation(variables, step)
    evaluation.finish(results)
    if jax.process_index() == 0:
        print(results.text)
        print(f"step {step}; figures and pictures: {result_folder(workdir, step)}")
        if model.offsets is not None:
            print(f"refined by {refine}")
    return results


def result_folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Where the results of a step are."""
    return workdir / "evaluation" / str(step)


def read_results(workdir: pathlib.Path, step: int) -> Results | None:
    """The results of a step that was evaluated before, without pictures; None if it was not."""
    path = result_folder(workdir, step) / _RESULTS
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    scalars = {k: math.nan if v is None else v for k, v in content["scalars"].items()}
    return Results(content["step"], scalars, content["table"])


def evaluated_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a run whose evaluation came to its end, in their order."""
    return sorted(int(p.parent.name) for p in workdir.glob("evaluation/*/results.json"))


def last_results(workdir: pathlib.Path) -> Results:
    """The results of the last step that was evaluated; FileNotFoundError if none was."""
    steps = evaluated_steps(workdir)
    results = read_results(workdir, steps[-1]) if steps else None
    if results is None:
        raise FileNotFoundError(f"{workdir} holds no evaluation; train or evaluate there first")
    return results


def _write_results(folder: pathlib.Path, results: Results) -> None:
    """Writes figures, the table, and the counts that they follow from."""
    content = {
        "step": results.step,
        "scalars": results.scalars,
        "table": results.table,
        "counts": jax.tree.map(lambda x: np.asarray(x).tolist(), _as_dicts(results.counts)),
    }
    files.write_text(folder / _RESULTS, files.json_text(content, indent=1) + "\n")


def _as_dicts(counts: Any) -> Any:
    if hasattr(counts, "_asdict"):
        counts = counts._asdict()
    return {k: _as_dicts(v) for k, v in counts.items()} if isinstance(counts, dict) else counts


def _blank(variants: Sequence[str], ndim: int) -> visualize.View:
    """An image without labelled pixels: counts of it are zeros of the right shapes."""
    one = (1,) * ndim
    nothing = np.zeros(one, np.uint8)
    return visualize.View(
        index=-1,
        image=np.zeros((*one, 3), np.uint8),
        label=np.full(one, IGNORE_LABEL, np.uint8),
        predictions=dict.fromkeys(variants, nothing),
        edges=np.zeros((*one, 0), np.uint8),
    )
