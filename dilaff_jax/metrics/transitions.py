"""What refinement does to pixels, by class and by distance to the nearest class boundary."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Integer

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.metrics.boundary import boundary_distance, check_maps
from dilaff_jax.metrics.regions import check_counts

KINDS = (
    "unchanged_right",
    "unchanged_wrong",
    "wrong_to_right",
    "right_to_wrong",
    "wrong_to_wrong",
)
DISTANCES = (1, 2, 4, 8, 16, 32)


class Transitions(NamedTuple):
    """Labelled pixels by what happened to them, in the order of `KINDS`.

    Attributes:
        by_distance: int64 `[len(distances) + 1, 5]`, see `transitions`.
        by_class: int64 `[C, 5]`, by true class.
    """

    by_distance: np.ndarray
    by_class: np.ndarray


def transitions(
    before: Integer[ArrayLike, " *spatial"],
    after: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    distances: Sequence[float] = DISTANCES,
    ignore_label: int = IGNORE_LABEL,
) -> Transitions:
    """Compares two predictions of one image `[*spatial]` with its labels.

    Row n of `by_distance` holds the pixels with distances[n-1] ≤ `boundary_distance` <
    distances[n], the first from 0 and the last without end. A pixel that is wrong before and after
    is "wrong_to_wrong" if its class changed, else "unchanged_wrong".

    Raises:
        UserError: shapes that do not match, impossible labels or predictions, distances that do
            not increase.
    """
    before, _ = check_maps(before, labels, num_classes, ignore_label)
    after, labels = check_maps(after, labels, num_classes, ignore_label)
    if not distances or any(b <= a for a, b in itertools.pairwise((0, *distances))):
        raise UserError(f"distances are {tuple(distances)}; expected increasing positive numbers")
    was, now, changed = before == labels, after == labels, before != after
    kind = np.select([was & now, ~changed, now, was], [0, 1, 2, 3], default=4)
    row = np.digitize(boundary_distance(labels, ignore_label), distances)
    labelled = labels != ignore_label
    return Transitions(
        _count(row[labelled], kind[labelled], len(distances) + 1),
        _count(labels[labelled], kind[labelled], num_classes),
    )


def transition_summary(
    counts: Transitions,
    distances: Sequence[float] = DISTANCES,
    class_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Turns sums of counts into shares of all pixels, of each ring of distances, of each class.

    KIND: each of `KINDS`; changed: the last three; gain: wrong_to_right - right_to_wrong, which is
    the change of pixel accuracy. The same under distance/A-B/ (pixels, ≥ A and < B) and
    class/NAME/. Rows without pixels are left out.

    Raises:
        UserError: names or distances that do not match the counts.
    """
    by_distance, by_class = check_counts(counts.by_distance), check_counts(counts.by_class)
    names = [str(c) for c in range(len(by_class))] if class_names is None else list(class_names)
    if len(names) != len(by_class) or len(distances) + 1 != len(by_distance):
        raise UserError(
            f"{len(names)} class names and {len(distances)} distances; expected {len(by_class)} "
            f"and {len(by_distance) - 1}"
        )
    limits = [f"{d:g}" for d in (0, *distances, np.inf)]
    rings = [f"distance/{a}-{b}/" for a, b in itertools.pairwise(limits)]
    rows = {"": by_distance.sum(axis=0)}
    rows |= dict(zip(rings, by_distance, strict=True))
    rows |= {f"class/{name}/": row for name, row in zip(names, by_class, strict=True)}
    return {f"{k}{name}": x for k, row in rows.items() for name, x in _shares(row).items()}


def _shares(row: np.ndarray) -> dict[str, float]:
    if not row.sum():
        return {}
    shares = row / row.sum()
    return {
        **{kind: float(share) for kind, share in zip(KINDS, shares, strict=True)},
        "changed": float(shares[2:].sum()),
        "gain": float(shares[2] - shares[3]),
    }


def _count(row: np.ndarray, kind: np.ndarray, rows: int) -> np.ndarray:
    cells = np.bincount(row * len(KINDS) + kind, minlength=rows * len(KINDS))
    return cells.reshape(rows, len(KINDS)).astype(np.int64)
