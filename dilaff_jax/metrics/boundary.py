"""Quality near class boundaries, counted on the host, one image `[*spatial]` at a time.

One definition serves all (except Boundary IoU, which has its own): a boundary pixel has a
neighbour of another class along an axis, so boundaries are two pixels wide. Void is no class: each
void pixel first takes the class of the nearest labelled one, so that the border of a void region is
no boundary, while two classes that a void strip parts (as in Pascal VOC) still have one, along its
middle. Void pixels are never counted. Cut the padding of a batch off before: its edge is no void.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import scipy.spatial
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Integer, Real

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL, check_values
from dilaff_jax.metrics.regions import (
    check_counts,
    class_ious,
    divide,
    host_confusion,
    mean,
)

# Widths of trimap bands, in pixels.
WIDTHS = (1, 2, 4, 8, 16, 32)


class _Points(NamedTuple):
    """Boundary pixels: where, of which class, and whether they count."""

    place: np.ndarray
    label: np.ndarray
    counted: np.ndarray

    def of(self, c: int) -> "_Points":
        here = self.label == c
        return _Points(self.place[here], self.label[here], self.counted[here])


class BoundaryF(NamedTuple):
    """Counts of `boundary_f`.

    Attributes:
        pixels: int64 `[4]`: predicted boundary pixels, those near a true boundary; true boundary
            pixels, those near a predicted one. Boundaries between any two classes.
        score_sum: float64 `[C]`: sum over images of the class's F-score.
        images: int64 `[C]`: images in which the class has a boundary, true or predicted.
    """

    pixels: np.ndarray
    score_sum: np.ndarray
    images: np.ndarray


def boundary_distance(
    labels: Integer[ArrayLike, " *spatial"], ignore_label: int = IGNORE_LABEL
) -> Float[np.ndarray, " *spatial"]:
    """Euclidean distance of each pixel to the nearest boundary pixel, float64 `[*spatial]`.

    0 on a boundary pixel (see above), 1 beside it; infinite if there is no boundary.
    """
    boundary = boundary_pixels(_fill(np.asarray(labels), ignore_label))
    if not boundary.any():
        return np.full(boundary.shape, np.inf)
    return scipy.ndimage.distance_transform_edt(~boundary)


def trimap(
    pred: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    widths: Sequence[float] = WIDTHS,
    ignore_label: int = IGNORE_LABEL,
) -> Int[np.ndarray, " W C C"]:
    """Confusion matrices of the pixels within a band around true boundaries: int64 `[W, C, C]`.

    A band of width r holds the labelled pixels with `boundary_distance` < r: r pixels on each side.
    Trimap IoU of Kohli et al. 2009 and Krähenbühl and Koltun 2011 (arXiv 1210.5644), who dilate the
    void strips of VOC instead.

    Raises:
        UserError: shapes that do not match, impossible labels or predictions.
    """
    pred, labels = check_maps(pred, labels, num_classes, ignore_label)
    distance = boundary_distance(labels, ignore_label)
    labelled = labels != ignore_label
    bands = [labelled & (distance < width) for width in widths]
    return np.stack([host_confusion(pred, labels, num_classes, band) for band in bands])


def boundary_iou(
    pred: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    dilation_ratio: float = 0.02,
    ignore_label: int = IGNORE_LABEL,
) -> Int[np.ndarray, " C 2"]:
    """Intersection and union of each class's boundary band, int64 `[C, 2]`.

    The band of a mask is what d erosions by a square of 3 pixels take away, the outside of the
    image being no part of the mask; d = max(1, round(ratio·diagonal)). Cheng et al. 2021
    (https://arxiv.org/abs/2103.16562) and their `mask_to_boundary`, a class's pixels being the
    mask. Summed over images as the IoU of a data set is: our choice, they average over instances.
    Void pixels erode nothing, in the labels as in the prediction, and do not count.

    Raises:
        UserError: as `trimap`.
    """
    pred, labels = check_maps(pred, labels, num_classes, ignore_label)
    void = labels == ignore_label
    depth = max(1, round(dilation_ratio * float(np.linalg.norm(labels.shape))))
    here = [_band(x, void, depth) & ~void for x in (pred, labels)]
    either = [
        np.bincount(x[b], minlength=num_classes) for x, b in zip((pred, labels), here, strict=True)
    ]
    both = np.bincount(labels[here[0] & here[1] & (pred == labels)], minlength=num_classes)
    return np.stack([both, either[0] + either[1] - both], axis=1).astype(np.int64)


def boundary_f(
    pred: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    tolerance: float = 2.0,
    ignore_label: int = IGNORE_LABEL,
) -> BoundaryF:
    """Counts for the boundary F-score, F = 2PR/(P + R), at a tolerance in pixels.

    P is the share of predicted boundary pixels at most `tolerance` from a true one, R the reverse.
    Once for boundaries between any two classes, pixels of all images pooled; and per class, of the
    boundary pixels that have this class, F of each image averaged over images: Csurka et al. 2013
    (bmva.org/bmvc/2013/Papers/paper0032), MATLAB's `bfscore`, which differ in counting the edge of
    the image as a boundary and in the strict inequality. Boundary pixels in void do not count, but
    may lie near ones that do; where void strips part all classes (VOC), choose a tolerance above
    their width.

    Raises:
        UserError: as `trimap`; a negative tolerance.
    """
    pred, labels = check_maps(pred, labels, num_classes, ignore_label)
    if not tolerance >= 0:
        raise UserError(f"tolerance is {tolerance}; expected a distance in pixels, at least 0")
    labelled = labels != ignore_label
    predicted, true = _points(pred, labelled), _points(_fill(labels, ignore_label), labelled)
    score_sum, images = np.zeros(num_classes), np.zeros(num_classes, np.int64)
    for c in np.union1d(predicted.label, true.label):
        matches = _matches(predicted.of(c), true.of(c), tolerance)
        images[c] = bool(matches[0] or matches[2])
        score_sum[c] = np.nan_to_num(f_score(matches))
    return BoundaryF(_matches(predicted, true, tolerance), score_sum, images)


def boundary_counts(
    pred: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    tolerance: float,
) -> dict[str, Any]:
    """All counts of one image that need its boundaries, by their names in `boundary_summary`.

    Raises:
        UserError: as `trimap`.
    """
    return {
        "iou": boundary_iou(pred, labels, num_classes),
        "f": boundary_f(pred, labels, num_classes, tolerance),
        "trimaps": trimap(pred, labels, num_classes),
    }


def boundary_summary(
    *,
    iou: Real[ArrayLike, " C 2"] | None = None,
    f: BoundaryF | None = None,
    trimaps: Real[ArrayLike, " W C C"] | None = None,
    widths: Sequence[float] = WIDTHS,
) -> dict[str, float]:
    """Turns sums of the counts above into figures; give those that were counted.

    boundary_iou: mean over classes that have a band; boundary_f, boundary_precision,
    boundary_recall: any two classes; boundary_f_class: mean over classes of the mean over images;
    trimap_miou/R: mIoU in the band of width R. What is undefined is left out.
    """
    figures: dict[str, np.ndarray] = {}
    if iou is not None:
        counts = check_counts(iou)
        figures["boundary_iou"] = mean(divide(counts[:, 0], counts[:, 1]))
    if f is not None:
        predicted, hit, true, recalled = check_counts(f.pixels)
        figures["boundary_f"] = f_score(f.pixels)
        figures["boundary_precision"] = divide(hit, predicted)
        figures["boundary_recall"] = divide(recalled, true)
        figures["boundary_f_class"] = mean(divide(f.score_sum, f.images))
    if trimaps is not None:
        for width, counts in zip(widths, check_counts(trimaps), strict=True):
            figures[f"trimap_miou/{width:g}"] = mean(class_ious(counts))
    return {key: float(value) for key, value in figures.items() if not np.isnan(value)}


def _fill(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Gives void pixels the class of the nearest labelled pixel."""
    void = labels == ignore_label
    if not void.any() or void.all():
        return labels
    nearest = scipy.ndimage.distance_transform_edt(
        void, return_distances=False, return_indices=True
    )
    return labels[tuple(nearest)]


def boundary_pixels(labels: Integer[np.ndarray, " *spatial"]) -> Bool[np.ndarray, " *spatial"]:
    """Where a neighbour along an axis has another class, bool `[*spatial]`; void is a class."""
    boundary = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        a, b = np.moveaxis(labels, axis, 0), np.moveaxis(boundary, axis, 0)
        differs = a[1:] != a[:-1]
        b[1:] |= differs
        b[:-1] |= differs
    return boundary


def _band(labels: np.ndarray, void: np.ndarray, depth: int) -> np.ndarray:
    """Pixels with another class, or the outside, in the square of half-width `depth` around them.

    A square holds another class where its largest or its smallest class is another one: two
    filters serve all classes at once, and give what eroding class by class gives.
    """
    size, high = 2 * depth + 1, np.iinfo(np.int32).max
    largest = scipy.ndimage.maximum_filter(
        np.where(void, -1, labels), size, mode="constant", cval=high
    )
    smallest = scipy.ndimage.minimum_filter(
        np.where(void, high, labels), size, mode="constant", cval=high
    )
    return (largest != labels) | (smallest != labels)


def _points(labels: np.ndarray, counted: np.ndarray) -> _Points:
    boundary = boundary_pixels(labels)
    return _Points(np.argwhere(boundary), labels[boundary], counted[boundary])


def _matches(predicted: _Points, true: _Points, tolerance: float) -> np.ndarray:
    """What `BoundaryF.pixels` holds, of one image."""
    hit, recalled = _near(predicted, true, tolerance), _near(true, predicted, tolerance)
    return np.array([len(hit), hit.sum(), len(recalled), recalled.sum()], np.int64)


def _near(points: _Points, others: _Points, tolerance: float) -> np.ndarray:
    """Which counted points are near any of the others. A tree: boundaries are few pixels."""
    place = points.place[points.counted]
    if not len(place) or not len(others.place):
        return np.zeros(len(place), bool)
    distance, _ = scipy.spatial.cKDTree(others.place).query(place)
    return distance <= tolerance


def f_score(pixels: Real[np.ndarray, " *rows 4"]) -> Float[np.ndarray, " *rows"]:
    """2PR/(P + R) of `BoundaryF.pixels` `[..., 4]`, float64 `[...]`.

    0 if nothing matches, NaN without boundary on either side.
    """
    predicted, hit, true, recalled = np.moveaxis(np.asarray(pixels, np.float64), -1, 0)
    precision, recall = divide(hit, predicted), divide(recalled, true)
    score = np.nan_to_num(divide(2 * precision * recall, precision + recall))
    return np.where((predicted > 0) | (true > 0), score, np.nan)


def check_maps(
    pred: ArrayLike, labels: ArrayLike, num_classes: int, ignore_label: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a prediction and labels of one image as int32, or raises UserError."""
    pred, labels = np.asarray(pred), np.asarray(labels)
    if pred.shape != labels.shape or not labels.size:
        raise UserError(
            f"pred has shape {pred.shape} and labels {labels.shape}; expected one image of one "
            "shape [*spatial]"
        )
    check_values(labels, num_classes, ignore_label)
    check_values(pred, num_classes, None, "pred")
    return pred.astype(np.int32), labels.astype(np.int32)
