"""The confusion matrix and what follows from it."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL, check_values

Counts = TypeVar("Counts")

# What jitted counts become where a value is impossible: far below what good counts make up for, far
# above overflow when devices add. `add` and every figure refuse it.
POISON = -(2**24)


def add(*counts: Counts) -> Counts:
    """Sums counts of one kind on the host, in int64 (float64 where they are floats).

    Counts of a batch are int32; over a data set they must not be added in int32 or float32, which
    is exact only to 2^24.

    Raises:
        UserError: negative counts: values were counted under `jit` that are impossible.
    """

    def total(*leaves: ArrayLike) -> np.ndarray:
        return np.sum([check_counts(x) for x in leaves], axis=0)

    return jax.tree.map(total, *counts)


def check_counts(counts: ArrayLike) -> np.ndarray:
    """Returns counts as int64 or float64; raises UserError if one is negative."""
    counts = np.asarray(counts)
    if (counts < 0).any():
        raise UserError(
            "counts are negative: a label that is neither a class nor the ignore label, an "
            "impossible prediction, or NaN was counted under jit; call the function that counts "
            "outside jit to see the value"
        )
    return counts.astype(np.float64 if np.issubdtype(counts.dtype, np.floating) else np.int64)


def confusion(
    pred: Integer[ArrayLike, " B *spatial"],
    labels: Integer[ArrayLike, " B *spatial"],
    num_classes: int,
    ignore_label: int = IGNORE_LABEL,
    mask: Bool[ArrayLike, " ..."] | None = None,
) -> Int[Array, " C C"]:
    """Counts pixels by true class (rows) and predicted class (columns): int32 `[C, C]`.

    Under `jit`, where values cannot be seen, an impossible label or prediction at a pixel that
    counts makes all counts negative, which `add` and the figures refuse.

    Args:
        pred: predicted classes `[B, *spatial]`.
        labels: true classes `[B, *spatial]`; pixels with `ignore_label` do not count.
        num_classes: C.
        ignore_label: see `labels`.
        mask: bool, `[B]` or any leading part of the labels' shape: what counts at all, such as the
            rows of a padded batch that are images.

    Raises:
        UserError: shapes that do not match; outside `jit`, impossible values.
    """
    pred, labels = jnp.asarray(pred), jnp.asarray(labels)
    if pred.shape != labels.shape:
        raise UserError(
            f"pred has shape {pred.shape} and labels {labels.shape}; expected one shape"
        )
    counted = labels.astype(jnp.int32) != ignore_label
    if mask is not None:
        counted = counted & _spread(jnp.asarray(mask), labels.shape)
    _check_pixels(pred, labels, counted, num_classes, ignore_label)
    pred, labels = pred.astype(jnp.int32), labels.astype(jnp.int32)
    possible = (labels >= 0) & (labels < num_classes) & (pred >= 0) & (pred < num_classes)
    # One bincount; what does not count goes to a cell of its own, which is dropped.
    cell = jnp.where(counted & possible, labels * num_classes + pred, num_classes**2)
    counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)[:-1]
    counts = jnp.where(jnp.any(counted & ~possible), POISON, counts)
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


def class_ious(confusion: Real[ArrayLike, " C C"]) -> Float[np.ndarray, " C"]:
    """Intersection over union of each class, float64 `[C]`: n_cc / (Σ_k n_ck + Σ_k n_kc - n_cc).

    NaN for a class that is absent, that is neither in the labels nor predicted; a class that is
    only predicted has 0. As the evaluation scripts of Cityscapes and mmsegmentation have it.
    """
    counts = _check_confusion(confusion)
    return ious(np.diag(counts), counts.sum(axis=1), counts.sum(axis=0))


def ious(
    right: Real[ArrayLike, " *rows"],
    true: Real[ArrayLike, " *rows"],
    predicted: Real[ArrayLike, " *rows"],
) -> Float[np.ndarray, " *rows"]:
    """Intersection over union from pixels that are right, true and predicted, float64 `[...]`.

    NaN where there are neither true nor predicted ones.
    """
    right = np.asarray(right, np.float64)
    return divide(right, np.asarray(true) + np.asarray(predicted) - right)


def host_confusion(
    pred: Integer[np.ndarray, " *spatial"],
    labels: Integer[np.ndarray, " *spatial"],
    num_classes: int,
    mask: Bool[np.ndarray, " *spatial"],
) -> Int[np.ndarray, " C C"]:
    """`confusion` of the pixels in `mask`, in NumPy, of checked values: int64 `[C, C]`."""
    cell = labels[mask].astype(np.int64) * num_classes + pred[mask]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(confusion: Real[ArrayLike, " C C"]) -> Float[np.ndarray, " C"]:
    """Share of each class's pixels that is right (recall), float64 `[C]`; NaN without pixels."""
    counts = _check_confusion(confusion)
    return divide(np.diag(counts), counts.sum(axis=1))


def segmentation_summary(
    confusion: Real[ArrayLike, " C C"], class_names: Sequence[str] | None = None
) -> dict[str, float]:
    """Turns a confusion matrix into figures, shares in [0, 1] (Long et al. 2015, arXiv 1411.4038).

    miou: mean of `class_ious` over classes that are present. mean_accuracy: mean of
    `class_accuracies` over classes that have pixels. pixel_accuracy. frequency_weighted_iou:
    Σ_c share of c in the labels · IoU_c. classes: over how many the mIoU is taken. iou/NAME: of
    each class; absent classes are left out. Without any counted pixel the means are NaN.

    Raises:
        UserError: not a confusion matrix, or not one name a class.
    """
    counts = _check_confusion(confusion)
    names = [str(c) for c in range(len(counts))] if class_names is None else list(class_names)
    if len(names) != len(counts):
        raise UserError(f"{len(names)} class names for {len(counts)} classes")
    per_class, accuracies = class_ious(counts), class_accuracies(counts)
    present, total = ~np.isnan(per_class), counts.sum()
    frequency = divide(counts.sum(axis=1), total)
    return {
        "miou": float(mean(per_class)),
        "pixel_accuracy": float(divide(np.trace(counts), total)),
        "mean_accuracy": float(mean(accuracies)),
        "frequency_weighted_iou": float(np.sum(frequency[present] * per_class[present]))
        if total
        else float("nan"),
        "classes": float(present.sum()),
        **{f"iou/{name}": float(per_class[c]) for c, name in enumerate(names) if present[c]},
    }


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return divide(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def divide(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """Divides in float64, NaN where whole is 0 or NaN."""
    whole = np.asarray(whole, np.float64)
    return np.asarray(part, np.float64) / np.where(whole > 0, whole, np.nan)


def _spread(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if mask.dtype != bool or mask.shape != shape[: mask.ndim]:
        raise UserError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}; expected bool, a leading part of "
            f"{shape}"
        )
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))


def _check_pixels(
    pred: jax.Array, labels: jax.Array, counted: jax.Array, num_classes: int, ignore_label: int
) -> None:
    check_values(labels, num_classes, ignore_label)
    seen = not any(isinstance(x, jax.core.Tracer) for x in (pred, counted))
    where_counted = np.asarray(pred)[np.asarray(counted)] if seen else pred
    check_values(where_counted, num_classes, None, "pred")


def _check_confusion(confusion: ArrayLike) -> np.ndarray:
    counts = check_counts(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise UserError(f"confusion has shape {counts.shape}; expected [C, C]")
    return counts
