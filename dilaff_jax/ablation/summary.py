"""The numbers of `ablation.json`: everything the report shows, and nothing that is large."""

import datetime
import math
from typing import Any

import numpy as np

from dilaff_jax import affinity, metrics, resume
from dilaff_jax.ablation import arms, counts, scoring, statistics
from dilaff_jax.ablation.analysis import Study
from dilaff_jax.data import datasets
from dilaff_jax.metrics.transitions import DISTANCES
from dilaff_jax.runtime import provenance

FORMAT = 1
RELIABILITY_BINS = 15


def make(
    study: Study, costs: dict[str, Any], drawn: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Assembles the content of `ablation.json`; NaN becomes None.

    Args:
        study: after `select` and `count`.
        costs: of `expense.measure`.
        drawn: of `showcase.draw`.
        seconds: that the analysis took in this call.
    """
    config = study.config
    spent = arms.Clock([run for runs in study.runs.values() for run in runs])
    result = {
        "format": FORMAT,
        "title": config.data.dataset,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "provenance": provenance.provenance("flax", "numpy", "scipy"),
        "seconds": {"training": spent.seconds, "analysis": seconds},
        "config": resume.as_json(config),
        "seeds": list(config.ablate.seeds),
        "arms": list(config.ablate.arms),
        "splits": _splits(study),
        "classes": {
            "names": list(study.source.class_names),
            "colors": np.asarray(study.source.colors).tolist(),
        },
        "tolerance": config.eval.tolerance,
        "selection": _selection(study),
        "variants": {v.name: _variant(study, v) for v in study.variants},
        "differences": _differences(study),
        "affinity": _affinity(study) if study.edge_histograms else None,
        "transitions": {v.name: _transitions(study, v) for v in study.variants if v.after},
        "per_image": _per_image(study),
        "cost": costs,
        "pictures": drawn,
    }
    return rounded(result)


def rounded(tree: Any) -> Any:
    """Six significant digits, so that files stay small; None for what is not finite."""
    if isinstance(tree, dict):
        return {str(k): rounded(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(v) for v in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if math.isfinite(tree) else None
    return tree


def _splits(study: Study) -> dict[str, Any]:
    config = study.config
    names = {
        "train": config.data.train_split,
        "selection": config.ablate.selection_split,
        "report": config.ablate.report_split,
    }
    sources = {key: datasets.load(config.data, name) for key, name in names.items()}
    splits = {
        key: {"split": names[key], "title": source.title, "images": len(source)}
        for key, source in sources.items()
    }
    splits["train"]["hold_out"] = list(config.data.hold_out)
    splits["report"]["size"] = [int(x) for x in np.max(sources["report"].sizes, axis=0)]
    return splits


def _selection(study: Study) -> dict[str, Any]:
    return {
        "criterion": study.config.ablate.criterion,
        "bias": [b.tolist() for b in study.bias],
        "missing": study.missing,
        "choices": {name: choice.as_json() for name, choice in study.selected.items()},
    }


def _by_seed(study: Study, variant: scoring.Variant) -> list[dict[str, float]]:
    names = study.source.class_names
    seeds = [counts.figures(c, names) for c in study.counts[variant.name]]
    return [{k: float(v[0]) for k, v in f.items()} for f in seeds]


def _variant(study: Study, variant: scoring.Variant) -> dict[str, Any]:
    seeds = _by_seed(study, variant)
    figures = {k: statistics.spread([s[k] for s in seeds]) for k in seeds[0]}
    # A class that no image has is undefined for every seed, and is left out.
    return {
        "title": variant.title,
        "arm": variant.arm,
        "after": str(variant.after) if variant.after else None,
        "figures": {k: v for k, v in figures.items() if not math.isnan(v["mean"])},
    }


def _differences(study: Study) -> list[dict[str, Any]]:
    """Paired by seed; intervals over seeds and, seeds held fixed, over images."""
    names = study.source.class_names
    weights = statistics.draws(len(study.source), study.config.ablate.resamples)
    # Every variant sees the same draws, so that differences are paired by image too.
    drawn = {
        v.name: [counts.figures(c, names, weights) for c in study.counts[v.name]]
        for v in study.variants
    }
    seeds = {v.name: _by_seed(study, v) for v in study.variants}
    result = []
    for one, other in scoring.pairs(study.variants):
        figures = {}
        for name in seeds[one.name][0]:
            both = zip(seeds[one.name], seeds[other.name], strict=True)
            values = [a[name] - b[name] for a, b in both]
            if any(math.isnan(v) for v in values):
                continue
            resampled = [
                a[name] - b[name] for a, b in zip(drawn[one.name], drawn[other.name], strict=True)
            ]
            figures[name] = statistics.spread(values) | {
                "over_seeds": statistics.seed_interval(values),
                "over_images": statistics.image_interval(np.array(resampled)),
            }
        result.append({"of": one.name, "minus": other.name, "figures": figures})
    return result


def _affinity(study: Study) -> dict[str, Any]:
    """Class edges per dilation: of the head at its fitted bias, of the segmentation by itself."""
    offsets = study.reported["joint"][0].offsets
    assert offsets is not None
    dilations = affinity.distinct_dilations(offsets)
    biases = study.bias or [np.zeros(len(dilations))] * len(study.edge_histograms)
    section: dict[str, Any] = {"dilations": dilations, "K": len(offsets)}
    section["grid"] = list(study.reported["joint"][0].affinity_logits.shape[1:3])  # type: ignore[union-attr]
    zero = [np.zeros(len(dilations))] * len(study.edge_histograms)
    for name, which, bias in (
        ("head", "head", biases),
        ("head_unbiased", "head", zero),
        ("segmentation", "segmentation", zero),
    ):
        seeds = [
            metrics.affinity_summary(e[which], dilations, bias=b)
            for e, b in zip(study.edge_histograms, bias, strict=True)
        ]
        shared = [k for k in seeds[0] if all(k in s for s in seeds)]
        section[name] = {k: statistics.spread([s[k] for s in seeds]) for k in shared}
    pooled = metrics.add(*(e["head"] for e in study.edge_histograms))
    section["reliability"] = {
        name: _reliability(pooled, np.mean(bias, axis=0))
        for name, bias in (("fitted", biases), ("none", zero))
    }
    return section


def _reliability(histogram: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
    confidence, share, number = metrics.reliability(histogram, bias=bias, bins=RELIABILITY_BINS)
    return {"mean": confidence.tolist(), "share": share.tolist(), "edges": number.tolist()}


def _transitions(study: Study, variant: scoring.Variant) -> dict[str, Any]:
    """Shares of pixels by what happened to them, by seed; and by distance and class, pooled."""
    of_seeds = [
        metrics.Transitions(c["by_distance"].sum(axis=0), c["by_class"].sum(axis=0))
        for c in study.counts[variant.name]
    ]
    names = study.source.class_names
    seeds = [metrics.transition_summary(t, class_names=names) for t in of_seeds]
    keys = [k for k in seeds[0] if "/" not in k]
    pooled = metrics.add(*of_seeds)
    return {
        "figures": {k: statistics.spread([s[k] for s in seeds]) for k in keys},
        "kinds": list(metrics.KINDS),
        "distances": list(DISTANCES),
        "by_distance": pooled.by_distance.tolist(),
        "by_class": pooled.by_class.tolist(),
    }


def _per_image(study: Study) -> dict[str, Any] | None:
    """MIoU within each image before and after propagation, and the pixels gained; seeds' means."""
    if "refined" not in study.counts:
        return None
    before = np.mean([counts.per_image_miou(c) for c in study.counts["joint"]], axis=0)
    after = np.mean([counts.per_image_miou(c) for c in study.counts["refined"]], axis=0)
    gain = np.mean([gains(c) for c in study.counts["refined"]], axis=0)
    return {
        "names": list(study.source.names),
        "before": [round(float(x), 4) for x in before],
        "after": [round(float(x), 4) for x in after],
        "gain": [round(float(x), 5) for x in gain],
    }


def gains(transitions: dict[str, np.ndarray]) -> np.ndarray:
    """Pixels made right minus pixels made wrong, as a share of each image's labelled, `[N]`."""
    kinds = transitions["by_class"].sum(axis=1)
    right, wrong = metrics.KINDS.index("wrong_to_right"), metrics.KINDS.index("right_to_wrong")
    return (kinds[:, right] - kinds[:, wrong]) / np.maximum(kinds.sum(axis=1), 1)
