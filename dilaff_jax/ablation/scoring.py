"""The variants that are reported, and their counts on every image of the report split."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dilaff_jax.ablation import baseline_outputs, cache, counts, network_outputs, operators
from dilaff_jax.ablation.ablate_config import RIVALS
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.operators import Candidate
from dilaff_jax.ablation.selection import Selected

TITLES = {
    "baseline": "baseline",
    "joint": "+ affinity loss",
    "refined": "+ affinity loss + propagation",
    "aaf": "baseline + AAF loss",
}
RIVAL_TITLES = {"dense_crf": "DenseCRF", "pamr": "PAMR"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is reported under one name: the networks of an arm, and what is done after them."""

    name: str
    title: str
    arm: str
    after: Candidate | None = None


def variants(arms: Sequence[str], selected: Mapping[str, Selected]) -> list[Variant]:
    """The arms, then each rival on the logits of the baseline and of the joint networks."""
    reported = []
    for arm in TITLES:
        if arm in arms:
            after = selected["refined"].chosen if arm == "refined" else None
            trained = "joint" if arm == "refined" else arm
            reported.append(Variant(arm, TITLES[arm], trained, after))
    for arm in ("baseline", "joint"):
        for rival in RIVALS:
            name = f"{arm}+{rival}"
            if name in selected:
                title = f"{TITLES[arm]} + {RIVAL_TITLES[rival]}"
                reported.append(Variant(name, title, arm, selected[name].chosen))
    return reported


def pairs(reported: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """Which differences are reported: (variant, what is taken away)."""
    names = {v.name: v for v in reported}
    wanted = [("joint", "baseline"), ("refined", "joint"), ("refined", "baseline")]
    wanted += [("aaf", "baseline"), ("refined", "aaf")]
    rivals = [v for v in reported if "+" in v.name]
    wanted += [(v.name, v.arm) for v in rivals] + [("refined", v.name) for v in rivals]
    return [(names[a], names[b]) for a, b in wanted if a in names and b in names]


def plain_maps(outputs: Outputs, rows: int) -> list[np.ndarray]:
    """The unrefined classes of every image, uint8 `[h, w]`."""
    label_maps = []
    for batch in outputs.batches(rows):
        maps = np.asarray(network_outputs.plain_labels(batch.logits, outputs.size))
        label_maps += [
            outputs.cut(map_, int(i)) for i, map_ in zip(batch.indices, maps, strict=False)
        ]
    return label_maps


def maps_after(
    outputs: Outputs,
    after: Candidate,
    bias: np.ndarray | None,
    rows: int,
    executor: baseline_outputs.Pool,
    indices: np.ndarray | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each image's index and classes after a candidate, uint8 `[h, w]`."""
    every = np.arange(len(outputs)) if indices is None else indices
    if bias is None:
        yield from baseline_outputs.refined_labels(outputs, after, every, executor)
        return
    for batch, maps in operators.refined_labels(outputs, [after], bias, rows, every):
        for index, map_ in zip(batch.indices, maps[0], strict=True):
            yield int(index), outputs.cut(map_, int(index))


def count(
    outputs: Outputs,
    variant: Variant,
    about: Mapping[str, Any],
    plain: Sequence[np.ndarray],
    maps: Iterable[tuple[int, np.ndarray]],
    tolerance: float,
) -> cache.Arrays:
    """Counts of every image `[N, ...]`; with what changed, if something comes after the network.

    Args:
        outputs: of one run on the report split.
        variant: which variant.
        about: what else the maps depend on.
        plain: of `plain_maps`.
        maps: index and classes of every image; not asked for where the counts are kept.
        tolerance: of the boundary F-score, pixels.
    """
    classes = outputs.source.num_classes

    def one(pair: tuple[int, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
        index, map_ = pair
        truth = outputs.source[index]["label"]
        of_image = counts.of_image(map_, truth, classes, tolerance)
        if variant.after is not None:
            of_image |= counts.changes(plain[index], map_, truth, classes)
        return index, of_image

    def make() -> cache.Arrays:
        by_index: dict[int, dict[str, np.ndarray]] = {}
        bar = tqdm(total=len(outputs), desc=f"counts of {variant.title}", leave=False)
        left = iter(maps)
        with bar, concurrent.futures.ThreadPoolExecutor() as threads:
            # Part by part: a pool would take all maps into memory at once.
            while part := list(itertools.islice(left, 16)):
                by_index |= dict(threads.map(one, part))
                bar.update(len(part))
        ordered = [by_index[i] for i in range(len(outputs))]
        return {k: np.stack([x[k] for x in ordered]) for k in ordered[0]}

    depends = {"outputs": outputs.about, "tolerance": tolerance, **about}
    return cache.arrays(outputs.folder / f"counts-{variant.name}.npz", depends, make)
