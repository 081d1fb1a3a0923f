"""A study in which nothing is selected: its networks compared by their last evaluations.

`config.ablate.grid = {}` says so. Each network is evaluated once, at the end of its training, on
the report split, with the operator of `config.refine` as it is. So volumes are studied, too, and
many seeds cost no more than their trainings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dilaff_jax import evaluate, resume
from dilaff_jax.ablation import arms, statistics, summary
from dilaff_jax.data import datasets
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import cost, provenance, reporting

FORMAT = 1
# For so many seeds it is worked out how far they would reach, from the scatter of those there are.
SEEDS = (3, 5, 10, 20)
_OF_IMAGES, _OF_VOLUMES = ("miou", "boundary_f"), ("dice", "surface_dice")
# Of an evaluation, what says little that others do not.
_LEFT_OUT = ("classes", "boundary_precision", "boundary_recall", "boundary_f_class")


def compare(config: ml_collections.ConfigDict, todo: Sequence[arms.Run]) -> dict[str, Any]:
    """Figures of every network over its seeds, and its differences from the baseline and "joint".

    Args:
        config: complete, see `ablate_config.complete`.
        todo: trained runs, of as many seeds each.

    Returns:
        rows: by network, `{"plain": {figure: spread}, "refined": ...}`, parameters, GFLOP of a
        crop; differences: by network, paired by seed, with their interval over seeds; pairs: the
        main figures of every network minus every other's; resolution: by network, {figure: {seeds:
        half the width of the interval that so many would give}}.
    """
    by_name: dict[str, list[arms.Run]] = {}
    for each in todo:
        by_name.setdefault(each.arm, []).append(each)
    source = datasets.load(config.data, config.ablate.report_split)
    rows = {name: _figures(runs) for name, runs in by_name.items()}
    differences = {name: _differences(row, rows) for name, row in rows.items()}
    for name, runs in by_name.items():
        config_of_one = runs[0].config
        rows[name] |= network(config_of_one, source.num_classes, config_of_one.data.crop_size)
    return summary.rounded(
        {
            "format": FORMAT,
            "title": source.title,
            "provenance": provenance.provenance("flax", "numpy", "scipy"),
            "device": jax.devices()[0].device_kind,
            "config": resume.as_json(config),
            "images": len(source),
            "seeds": list(config.ablate.seeds),
            "seconds": arms.Clock(todo).seconds,
            "rows": rows,
            "differences": differences,
            "pairs": _pairs(rows),
            "resolution": {
                name: {f: _resolution(d) for f, d in found["plain minus baseline"].items()}
                for name, found in differences.items()
                if name != "baseline"
            },
        }
    )


def table(result: Mapping[str, Any]) -> str:
    """The main figures in per cent; plain and refined minus the plain baseline, with intervals."""

    def said(difference: Mapping[str, Any] | None) -> str:
        if difference is None:
            return "-"
        mean, over = difference["mean"], difference["over_seeds"]
        interval = "" if over is None else f" [{100 * over[0]:.1f}, {100 * over[1]:.1f}]"
        return f"{100 * mean:+.2f}{interval}"

    figures = _main(result["rows"])
    rows = [
        [
            name,
            *(f"{100 * row['plain'][f]['mean']:.2f}" for f in figures),
            *(
                said(result["differences"][name].get(f"{kind} minus baseline", {}).get(f))
                for kind in (evaluate.PLAIN, evaluate.REFINED)
                for f in figures
            ),
        ]
        for name, row in result["rows"].items()
    ]
    head = ["", *figures, *(f"Δ {f}" for f in figures), *(f"Δ refined {f}" for f in figures)]
    seeds = len(result["seeds"])
    title = f"{result['title']}: {result['images']} images, {seeds} seeds, per cent"
    return reporting.table(title, head, rows)


def _figures(of: Sequence[arms.Run]) -> dict[str, Any]:
    """{"plain": {figure: spread over seeds}, "refined": ...} of the last evaluations."""
    scalars = [evaluate.last_results(run.workdir).scalars for run in of]
    found: dict[str, Any] = {}
    for kind in (evaluate.PLAIN, evaluate.REFINED):
        names = [n.removeprefix(f"{kind}/") for n in scalars[0] if n.startswith(f"{kind}/")]
        if names:
            found[kind] = {
                name: statistics.spread([s[f"{kind}/{name}"] for s in scalars])
                for name in names
                if name not in _LEFT_OUT
            }
    return found


def _differences(row: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Plain and refined minus the baseline's plain, refined minus plain, and minus joint's."""
    found = {}
    for kind in (evaluate.PLAIN, evaluate.REFINED):
        others = {"baseline": rows["baseline"]["plain"], "plain": row["plain"]}
        others["joint"] = rows["joint"].get(kind, {}) if "joint" in rows else {}
        for name, other in others.items():
            if kind in row and other and (kind, name) != (evaluate.PLAIN, "plain"):
                found[f"{kind} minus {name}"] = {
                    figure: statistics.paired(row[kind][figure], other[figure])
                    for figure in row[kind]
                    if figure in other
                }
    return found


def _pairs(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As of a network and its like with fewer images, whose baseline is neither of both."""
    figures = _main(rows)
    return [
        {"of": one, "minus": other}
        | {
            kind: {
                f: statistics.paired(rows[one][kind][f], rows[other]["plain"][f]) for f in figures
            }
            for kind in (evaluate.PLAIN, evaluate.REFINED)
            if kind in rows[one]
        }
        for one in rows
        for other in rows
        if one != other
    ]


def _main(rows: Mapping[str, Any]) -> tuple[str, ...]:
    return _OF_VOLUMES if "dice" in rows["baseline"]["plain"] else _OF_IMAGES


def _resolution(difference: Mapping[str, Any]) -> dict[str, float] | None:
    std = difference["std"]
    return None if std is None else {str(n): statistics.half_width(std, n) for n in SEEDS}


def network(
    config: ml_collections.ConfigDict, num_classes: int, size: Sequence[int]
) -> dict[str, Any]:
    """Parameters of a run's network, and GFLOP of a forward pass of one image of a size."""
    model = segmenter.build(segmenter.config_of_run(config), num_classes)
    abstract = segmenter.abstract_variables(model)
    image = jax.ShapeDtypeStruct((1, *size, model.channels), jnp.uint8)
    flops = cost.flops(lambda v, x: model.apply(v, x, train=False), abstract, image)
    return {"parameters": cost.parameters(abstract), "gflop": flops / 1e9}
