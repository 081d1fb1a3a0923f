"""The whole of an ablation, read top to bottom."""

import importlib.util
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from dilaff_jax import settings
from dilaff_jax.ablation import (
    ablate_config,
    arms,
    baseline_outputs,
    cache,
    cost_table,
    operators,
    qualitative,
    summary,
)
from dilaff_jax.ablation.analysis import Study
from dilaff_jax.data import datasets
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import preemption, reporting


def ablate(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains what is not trained, selects, evaluates; writes and returns `ablation.json`.

    Stopped at any moment and started again, it goes on where it was. Started several times at
    once, on one machine, on a disk that all see or in a bucket, the processes share the training.

    Raises:
        UserError: the config cannot be; a folder holds a run of another config.
        Preempted: the process was asked to stop; what is done is kept.
    """
    config = ablate_config.complete(config)
    settings.check(config)
    config = datasets.completed(config)
    ablate_config.check_images(config)
    ablate_config.check(config)
    operators.grid(config.ablate.grid.to_dict())  # said before anything is trained
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes: an ablation runs in one. Train its runs as ordinary "
            "runs in WORKDIR/ARM/seed-N with several, then start it with one"
        )
    with preemption.stopping_cleanly(workdir) as training:
        arms.train_all(arms.runs(config, workdir), training)
        with arms.analysing(workdir) as folder:
            return _analyse(Study(config, arms.runs(config, folder)), folder)


def _analyse(study: Study, workdir: pathlib.Path) -> dict[str, Any]:
    started = time.perf_counter()
    with baseline_outputs.pool(study.config.ablate.processes) as executor:
        study.select(executor)
        study.count(executor)
        drawn = qualitative.draw(study, workdir / "pictures", executor)
    costs = cost_table.measure(study, workdir)
    result = summary.make(study, costs, drawn, time.perf_counter() - started)
    cache.publish(workdir / "ablation.json", result)
    print(table(result))
    _render(workdir)
    return result


def table(result: dict[str, Any]) -> str:
    """The main figures, in per cent."""
    figures = {"miou": "mean IoU", "boundary_iou": "boundary IoU", "boundary_f": "boundary F"}

    def cell(variant: dict[str, Any], name: str) -> str:
        figure = variant["figures"].get(name)
        if figure is None:
            return "-"
        spread = "" if figure["std"] is None else f" ± {100 * figure['std']:.2f}"
        return f"{100 * figure['mean']:.2f}{spread}"

    rows = [[v["title"], *(cell(v, name) for name in figures)] for v in result["variants"].values()]
    split = result["splits"]["report"]
    title = f"{split['title']}: {split['images']} images, {len(result['seeds'])} seeds, per cent"
    return reporting.table(title, ["", *figures.values()], rows)


def _render(workdir: pathlib.Path) -> None:
    """Writes the page, where what draws it is installed."""
    absent = [name for name in ("jinja2", "matplotlib") if not importlib.util.find_spec(name)]
    if absent:
        print(
            f"no page: {' and '.join(absent)} not installed; pip install 'dilaff-jax[report]', "
            f"then python -m dilaff_jax.report {workdir}"
        )
        return
    from dilaff_jax.ablation import report

    print(f"written: {report.write(workdir)}")
