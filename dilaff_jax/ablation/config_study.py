"""What decides the gain? One network a change of the config, compared where nothing is reported.

    python -m dilaff_jax.main --config configs/NAME.py --workdir DIR --mode study

trains the baseline, the config as it is ("joint"), and the config with each change of
`config.ablate.changes`, over seeds; fits biases and selects the operator for each on the selection
split, and compares there. The report split stays unseen, so that `--mode ablate` can report what a
study decided. A selected operator is scored on what selected it: of some ten candidates on a
hundred images that flatters little, but it never falls below doing nothing.

With `config.ablate.grid = {}` nothing is selected, see `evaluations`.
"""

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

import ml_collections

from dilaff_jax import affinity, metrics, resume, settings
from dilaff_jax.ablation import (
    ablate_config,
    agreement,
    arms,
    cache,
    evaluations,
    network_outputs,
    operators,
    scoring,
    selection,
    statistics,
    summary,
)
from dilaff_jax.ablation.operators import IDENTITY, Candidate
from dilaff_jax.data import datasets
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import preemption, provenance, reporting

FORMAT = 1
_BY_EVALUATIONS = (evaluations.compare, evaluations.table)


def study(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains what is not trained, compares, writes and returns `study.json`.

    Stopped or started several times at once as `run.ablate`.

    Raises:
        UserError: the config, or a change of it, cannot be.
        Preempted: the process was asked to stop; what is done is kept.
    """
    config = datasets.completed(ablate_config.complete(config))
    if config.ablate.grid:
        ablate_config.check_images(config)
    compare, shown = (_compare, table) if config.ablate.grid else _BY_EVALUATIONS
    with preemption.stopping_cleanly(workdir) as training:
        arms.train_all(runs(config, workdir), training)
        with arms.analysing(workdir) as folder:
            result = compare(config, runs(config, folder))
            cache.publish(folder / "study.json", result)
    print(shown(result))
    return result


def runs(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> list[arms.Run]:
    """Baseline, joint, then a run for each change, all of one seed before the next seed."""
    settings.check(config)
    ablate_config.check(config)
    operators.grid(config.ablate.grid.to_dict())  # said before anything is trained
    named: dict[str, tuple[str, ml_collections.ConfigDict]] = {
        "baseline": ("baseline", config),
        "joint": ("joint", config),
    }
    for name, change in config.ablate.changes.to_dict().items():
        if name in named:
            raise UserError(f"ablate.changes has {name!r}, which every study has; rename it")
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"ablate.changes has {name!r}, which names a folder: letters, digits, _-"
            )
        named[name] = "joint", changed(config, change)
    for name, (arm, of_arm) in named.items():
        try:
            settings.check(of_arm)
            model = segmenter.config_of_run(arms.arm_config(of_arm, arm, seed=0))
            segmenter.abstract_variables(segmenter.build(model, num_classes=2))
        except UserError as error:
            raise UserError(f"ablate.changes, {name}: {error}") from error
    return [
        arms.Run(name, seed, arms.arm_config(of_arm, arm, seed), arms.home(workdir, name, seed))
        for seed in config.ablate.seeds
        for name, (arm, of_arm) in named.items()
    ]


def changed(config: ml_collections.ConfigDict, change: dict[str, Any]) -> ml_collections.ConfigDict:
    """A copy of the config with a nested dict of changes; keys it does not name stay."""
    result = copy.deepcopy(config)
    with result.unlocked(), result.ignore_type():
        result.update(change)
    return result


def _compare(config: ml_collections.ConfigDict, todo: Sequence[arms.Run]) -> dict[str, Any]:
    by_name: dict[str, list[arms.Run]] = {}
    for each in todo:
        by_name.setdefault(each.arm, []).append(each)
    split = config.ablate.selection_split
    source = network_outputs.compute(todo[0], split).source
    rows = {name: _row(config, runs) for name, runs in by_name.items()}
    return summary.rounded(
        {
            "format": FORMAT,
            "title": source.title,
            "provenance": provenance.provenance("flax", "numpy", "scipy"),
            "config": resume.as_json(config),
            "images": len(source),
            "seeds": list(config.ablate.seeds),
            "seconds": arms.Clock(todo).seconds,
            "rows": rows,
            "differences": {
                name: _differences(row, rows["baseline"], rows["joint"])
                for name, row in rows.items()
            },
        }
    )


def _row(config: ml_collections.ConfigDict, of: Sequence[arms.Run]) -> dict[str, Any]:
    """Figures of one change, over its seeds."""
    ablate, rows, tolerance = config.ablate, config.eval.batch_size, config.eval.tolerance
    outputs = [network_outputs.compute(r, ablate.selection_split) for r in of]
    source, size = outputs[0].source, outputs[0].size
    networks = evaluations.network(of[0].config, source.num_classes, size)
    if outputs[0].affinity_logits is None:
        plain = [selection.plain_scores(o, scoring.plain_maps(o, rows), tolerance) for o in outputs]
        return {"plain": _spreads(plain)} | networks
    configured = configured_candidate(of[0].config.refine)
    grid = list(dict.fromkeys([*operators.grid(ablate.grid.to_dict()), configured]))
    bias = [selection.fit_bias(o, rows) for o in outputs]
    scores = [
        selection.sweep(o, grid, b, rows, tolerance) for o, b in zip(outputs, bias, strict=True)
    ]
    chosen = selection.choose(grid, scores, ablate.criterion, len(outputs[0])).chosen
    offsets = outputs[0].offsets
    assert offsets is not None
    dilations = affinity.distinct_dilations(offsets)
    affinity_figures = [
        metrics.affinity_summary(operators.edge_histograms(o, rows)["head"], dilations, bias=b)
        | agreement.figures(agreement.count(o, b, rows), dilations)
        for o, b in zip(outputs, bias, strict=True)
    ]
    return {
        "plain": _spreads([s[IDENTITY.key] for s in scores]),
        "configured": {"operator": str(configured)} | _spreads([s[configured.key] for s in scores]),
        "refined": {"operator": str(chosen)} | _spreads([s[chosen.key] for s in scores]),
        "bias": [b.tolist() for b in bias],
        "affinity": _spreads(affinity_figures),
    } | networks


def configured_candidate(refine: ml_collections.ConfigDict) -> Candidate:
    """The operator of `config.refine`, which a network may have been trained through."""
    options = refine.to_dict()
    name = options.pop("name")
    of_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return Candidate(name, tuple(of_tuples.items()))


def _spreads(seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {k: statistics.spread([s[k] for s in seeds]) for k in seeds[0]}


def _differences(
    row: dict[str, Any], baseline: dict[str, Any], joint: dict[str, Any]
) -> dict[str, Any]:
    """Paired by seed: plain and refined minus the baseline, and minus joint likewise."""
    differences = {}
    for kind in ("plain", "refined"):
        for name, other in (("baseline", baseline["plain"]), ("joint", joint[kind])):
            if kind in row:
                differences[f"{kind} minus {name}"] = {
                    figure: statistics.paired(row[kind][figure], other[figure])
                    for figure in selection.FIGURES
                }
    return differences


def table(result: dict[str, Any]) -> str:
    """The main figures, in per cent."""

    def said(figures: dict[str, Any] | None, name: str) -> str:
        if not figures:
            return "-"
        spread = "" if figures[name]["std"] is None else f" ± {100 * figures[name]['std']:.1f}"
        return f"{100 * figures[name]['mean']:.2f}{spread}"

    rows = [
        [
            name,
            *(said(row["plain"], f) for f in ("miou", "boundary_f")),
            *(said(row.get("refined"), f) for f in ("miou", "boundary_f")),
            said(row.get("affinity"), "mean/average_precision"),
            row.get("refined", {}).get("operator", "-"),
        ]
        for name, row in result["rows"].items()
    ]
    title = f"{result['title']}: {result['images']} images, {len(result['seeds'])} seeds, per cent"
    head = ["", "mIoU", "F", "refined mIoU", "refined F", "edge AP", "operator"]
    return reporting.table(title, head, rows)
