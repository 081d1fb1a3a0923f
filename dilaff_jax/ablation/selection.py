"""Which candidate is taken: by its mean score over seeds on the selection split, nothing else."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dilaff_jax import metrics
from dilaff_jax.ablation import baseline_outputs, cache, counts, operators
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.operators import Candidate
from dilaff_jax.runtime import parallel

Scores = dict[str, dict[str, float]]
FIGURES = ("miou", "boundary_f", "trimap_miou")


@dataclasses.dataclass
class Selected:
    """A choice and all that was to choose from.

    Attributes:
        chosen: the candidate with the highest score; the earlier of equals, identity first.
        table: of every candidate its options, figures by seed, and score, for the report.
        images: on how many images of the selection split.
    """

    chosen: Candidate
    table: list[dict[str, Any]]
    images: int

    def as_json(self) -> dict[str, Any]:
        """For `ablation.json`."""
        chosen = {"operator": self.chosen.operator, "options": dict(self.chosen.options)}
        return {"chosen": chosen, "images": self.images, "candidates": self.table}


def choose(
    candidates: Sequence[Candidate], seeds: Sequence[Scores], criterion: str, images: int
) -> Selected:
    """Chooses by the mean over seeds of the criterion, see `config.ablate`.

    candidates: identity first, which the gains of "smaller_gain" are taken over.
    """
    plain = [float(np.mean([s[candidates[0].key][name] for s in seeds])) for name in FIGURES]
    table = []
    for candidate in candidates:
        of_seeds = [scores[candidate.key] for scores in seeds]
        parts = [[s[name] for s in of_seeds] for name in FIGURES]
        means = [float(np.mean(part)) for part in parts]
        score = {
            **dict(zip(FIGURES, means, strict=True)),
            "miou+boundary_f": float(np.mean(means[:2])),
            "smaller_gain": float(np.min(np.subtract(means, plain)[:2])),
        }[criterion]
        table.append(
            {
                "operator": candidate.operator,
                "options": dict(candidate.options),
                **dict(zip(FIGURES, parts, strict=True)),
                "score": score,
            }
        )
    # NaN, of a split without any boundary, is worse than all.
    scores = np.nan_to_num([row["score"] for row in table], nan=-1.0)
    return Selected(candidates[int(np.argmax(scores))], table, images)


def fit_bias(outputs: Outputs, rows: int) -> np.ndarray:
    """The bias per dilation `[D]` that calibrates the head on this split."""

    def fit() -> list[float]:
        return metrics.fit_bias(operators.edge_histograms(outputs, rows)["head"]).tolist()

    return np.array(cache.figures(outputs.folder / "bias.json", outputs.about, fit))


def sweep(
    outputs: Outputs, grid: Sequence[Candidate], bias: np.ndarray, rows: int, tolerance: float
) -> Scores:
    """The `FIGURES` of every candidate of propagation: {key: {figure: value}}."""
    about = {"outputs": outputs.about, "bias": bias.tolist(), "tolerance": tolerance}

    def run(group: Sequence[Candidate]) -> Iterable[tuple[Candidate, int, np.ndarray]]:
        labels = operators.refined_labels(outputs, group, bias, rows)
        for batch, maps in labels:
            for candidate, of_candidate in zip(group, maps, strict=True):
                for index, map_ in zip(batch.indices, of_candidate, strict=True):
                    yield candidate, int(index), outputs.cut(map_, int(index))

    groups = operators.groups(grid)
    return _sweep(outputs, "propagation", about, groups, run, outputs.own, tolerance)


def sweep_rival(
    outputs: Outputs,
    name: str,
    grid: Sequence[Candidate],
    indices: np.ndarray,
    tolerance: float,
    executor: baseline_outputs.Pool,
) -> Scores:
    """The same of a rival, on some images of the split."""
    about = {"outputs": outputs.about, "images": indices.tolist(), "tolerance": tolerance}

    def run(group: Sequence[Candidate]) -> Iterable[tuple[Candidate, int, np.ndarray]]:
        for candidate in group:
            for index, map_ in baseline_outputs.refined_labels(
                outputs, candidate, indices, executor
            ):
                yield candidate, index, map_

    groups = [[candidate] for candidate in grid]
    return _sweep(outputs, name, about, groups, run, indices, tolerance)


def plain_scores(
    outputs: Outputs, maps: Sequence[np.ndarray], tolerance: float
) -> dict[str, float]:
    """The `FIGURES` of the maps of `scoring.plain_maps`."""
    counted = [
        counts.Truth(example["label"], outputs.source.num_classes, tolerance).count(map_)
        for example, map_ in zip(
            map(outputs.source.__getitem__, range(len(maps))), maps, strict=True
        )
    ]
    return counts.quick_figures(*metrics.add(*counted))


def some_images(outputs: Outputs, limit: int) -> np.ndarray:
    """Indices of at most `limit` images (0: all), evenly spread."""
    count = min(limit or len(outputs), len(outputs))
    return np.unique(np.linspace(0, len(outputs) - 1, count).round().astype(int))


def _sweep(
    outputs: Outputs,
    name: str,
    about: Mapping[str, Any],
    groups: Sequence[Sequence[Candidate]],
    run: Callable[[Sequence[Candidate]], Iterable[tuple[Candidate, int, np.ndarray]]],
    images: np.ndarray,
    tolerance: float,
) -> Scores:
    """Scores what is not scored yet, and keeps the scores group by group."""
    path = outputs.folder / f"scores-{name}.json"
    about = {**about, "figures": list(FIGURES)}
    many = jax.process_count() > 1  # and each may have other scores, or none
    scores: Scores = {} if many else cache.read(path, about) or {}
    todo = [left for g in groups if (left := [c for c in g if c.key not in scores])]
    if not todo:
        return scores
    classes = outputs.source.num_classes
    truths = {
        int(i): counts.Truth(outputs.source[int(i)]["label"], classes, tolerance) for i in images
    }
    total = len(images) * sum(map(len, todo))
    quiet = jax.process_index() > 0
    with tqdm(total=total, desc=f"{name}: candidates by images", leave=False, disable=quiet) as bar:
        for group in todo:
            sums: dict[Candidate, Any] = {}
            for candidate, index, map_ in run(group):
                counted = truths[index].count(map_)
                sums[candidate] = metrics.add(
                    counted, *([sums[candidate]] if candidate in sums else [])
                )
                bar.update()
            counted_of = {c.key: parallel.sum_over_processes(sums[c]) for c in group}
            scores |= {key: counts.quick_figures(*counted) for key, counted in counted_of.items()}
            cache.write(path, about, scores)
    return scores
