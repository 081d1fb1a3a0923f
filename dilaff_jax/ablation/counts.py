"""Counts image by image, and all figures from weighted sums of them.

Kept apart by image, so that images can be drawn anew (bootstrap), ranked and paired. The figures
are those of `metrics` and are tested to be equal to them; here they are taken of many weightings at
once.
"""

import functools
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import scipy.ndimage

from dilaff_jax import metrics
from dilaff_jax.labels import IGNORE_LABEL


def of_image(
    pred: np.ndarray, truth: np.ndarray, num_classes: int, tolerance: float
) -> dict[str, np.ndarray]:
    """Counts of one prediction, both `[h, w]`.

    regions `[C, 3]` and trimaps `[W, C, 3]`: right, true and predicted pixels of each class;
    boundary_iou `[C, 2]`; boundary_f `[4]` and boundary_f_class `[C, 2]`, see `metrics.BoundaryF`.
    """
    f = metrics.boundary_f(pred, truth, num_classes, tolerance)
    bands = metrics.trimap(pred, truth, num_classes)
    return {
        "regions": _sides(
            metrics.host_confusion(pred, truth, num_classes, truth != IGNORE_LABEL)
        ).astype(np.int32),
        "trimaps": np.stack([_sides(band) for band in bands]).astype(np.int32),
        "boundary_iou": metrics.boundary_iou(pred, truth, num_classes).astype(np.int32),
        "boundary_f": f.pixels.astype(np.int32),
        "boundary_f_class": np.stack([f.score_sum, f.images], axis=1),
    }


def changes(
    before: np.ndarray, after: np.ndarray, truth: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """by_distance `[R, 5]` and by_class `[C, 5]`, see `metrics.Transitions`."""
    transitions = metrics.transitions(before, after, truth, num_classes)
    return {k: v.astype(np.int32) for k, v in transitions._asdict().items()}


def _sides(confusion: np.ndarray) -> np.ndarray:
    return np.stack([np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)], axis=1)


# The width of the band of the quick count's trimap, in pixels.
TRIMAP = 8


class Truth:
    """Labels of one image, prepared for the quick count that the search for operators makes.

    Args:
        label: `[*spatial]`.
        num_classes: C.
        tolerance: of the boundary F-score, pixels.
    """

    def __init__(self, label: np.ndarray, num_classes: int, tolerance: float) -> None:
        self._label, self._num_classes = label, num_classes
        self._labelled = label != IGNORE_LABEL
        distance = metrics.boundary_distance(label)
        self._boundary = (distance == 0) & self._labelled
        self._near = distance <= tolerance
        self._band = self._labelled & (distance < TRIMAP)
        self._tolerance = tolerance

    def count(self, pred: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Confusion matrix `[C, C]`, `metrics.boundary_f(...).pixels` `[4]`, and the trimap's.

        A hundred times as fast as the trees of `metrics.boundary_f`, as the truth's distances are
        known and whole pixels within the tolerance form a disc.
        """
        boundary = metrics.boundary_pixels(pred)
        near = self._close_to(boundary)
        counted = boundary & self._labelled
        pairs = (counted, counted & self._near, self._boundary, self._boundary & near)
        confusion = metrics.host_confusion(pred, self._label, self._num_classes, self._labelled)
        band = metrics.host_confusion(pred, self._label, self._num_classes, self._band)
        return confusion, np.array([p.sum() for p in pairs]), band

    def _close_to(self, boundary: np.ndarray) -> np.ndarray:
        if boundary.ndim == 2:
            return cv2.dilate(boundary.astype(np.uint8), _disc(self._tolerance)).astype(bool)
        if not boundary.any():
            return boundary
        return scipy.ndimage.distance_transform_edt(~boundary) <= self._tolerance


@functools.cache
def _disc(radius: float) -> np.ndarray:
    reach = int(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (y**2 + x**2 <= radius**2).astype(np.uint8)


def figures(
    counts: Mapping[str, np.ndarray], class_names: Sequence[str], weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Figures of weighted sums over images, each `[R]`, shares in [0, 1]; NaN where undefined.

    Args:
        counts: of `of_image`, stacked over N images.
        class_names: C names.
        weights: `[R, N]`, how often each image counts; None counts each once, R = 1.
    """
    images = len(counts["regions"])
    weights = np.ones((1, images)) if weights is None else weights
    total = {
        k: (weights @ v.reshape(images, -1).astype(np.float64)).reshape(-1, *v.shape[1:])
        for k, v in counts.items()
    }
    regions, f = total["regions"], total["boundary_f"]
    ious = _ious(regions)
    right, true = regions[..., 0], regions[..., 1]
    precision, recall = metrics.divide(f[:, 1], f[:, 0]), metrics.divide(f[:, 3], f[:, 2])
    per_class = total["boundary_f_class"]
    values = {
        "miou": metrics.mean(ious),
        "pixel_accuracy": metrics.divide(right.sum(axis=1), true.sum(axis=1)),
        "mean_accuracy": metrics.mean(metrics.divide(right, true)),
        "boundary_iou": metrics.mean(metrics.divide(*np.moveaxis(total["boundary_iou"], -1, 0))),
        "boundary_f": metrics.f_score(f),
        "boundary_precision": precision,
        "boundary_recall": recall,
        "boundary_f_class": metrics.mean(metrics.divide(*np.moveaxis(per_class, -1, 0))),
    }
    bands = metrics.mean(_ious(total["trimaps"]))
    values |= {f"trimap_miou/{width}": bands[:, i] for i, width in enumerate(metrics.WIDTHS)}
    return values | {f"iou/{name}": ious[:, c] for c, name in enumerate(class_names)}


def quick_figures(confusion: np.ndarray, pixels: np.ndarray, band: np.ndarray) -> dict[str, float]:
    """MIoU, boundary F and trimap mIoU of sums of `Truth.count`.

    Of the classes that the images have. A class that none has and some prediction names has an IoU
    of 0, and none at all once nobody names it: a choice by the mean over these, too, would be of
    who forgets the last pixel of such a class.
    """
    return {
        "miou": _mean_iou_of_those_there(confusion),
        "boundary_f": float(metrics.f_score(pixels.astype(np.float64))),
        "trimap_miou": _mean_iou_of_those_there(band),
    }


def _mean_iou_of_those_there(confusion: np.ndarray) -> float:
    sides = _sides(confusion)
    return float(metrics.mean(_ious(sides[sides[:, 1] > 0])))


def per_image_miou(counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean IoU within each image over the classes that are in it or predicted, `[N]`."""
    return metrics.mean(_ious(counts["regions"].astype(np.float64)))


def _ious(sides: np.ndarray) -> np.ndarray:
    return metrics.ious(*np.moveaxis(sides, -1, 0))
