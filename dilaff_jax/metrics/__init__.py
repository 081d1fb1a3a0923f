"""Counts that add over batches, devices and processes, and the figures that follow from them.

Counting and dividing are apart: `confusion`, `affinity_histogram` (on the device, under `jit`) and
`boundary_iou`, `boundary_f`, `trimap`, `transitions`, `surfaces` (on the host, image by image)
return counts; `add` sums them in int64; the `..._summary` functions turn sums into figures, all but
distances as shares in [0, 1]. A mean of per-batch figures is another number and is offered nowhere.
"""

from dilaff_jax.metrics.boundary import (
    WIDTHS,
    BoundaryF,
    boundary_counts,
    boundary_distance,
    boundary_f,
    boundary_iou,
    boundary_pixels,
    boundary_summary,
    f_score,
    trimap,
)
from dilaff_jax.metrics.edges import (
    affinity_histogram,
    affinity_summary,
    average_precision,
    best_f1,
    expected_calibration_error,
    fit_bias,
    precision_recall_f1,
    reliability,
)
from dilaff_jax.metrics.regions import (
    add,
    class_accuracies,
    class_ious,
    confusion,
    divide,
    host_confusion,
    ious,
    mean,
    segmentation_summary,
)
from dilaff_jax.metrics.surfaces import Surfaces, surface_summary, surfaces
from dilaff_jax.metrics.transitions import KINDS, Transitions, transition_summary, transitions

__all__ = [
    "KINDS",
    "WIDTHS",
    "BoundaryF",
    "Surfaces",
    "Transitions",
    "add",
    "affinity_histogram",
    "affinity_summary",
    "average_precision",
    "best_f1",
    "boundary_counts",
    "boundary_distance",
    "boundary_f",
    "boundary_iou",
    "boundary_pixels",
    "boundary_summary",
    "class_accuracies",
    "class_ious",
    "confusion",
    "divide",
    "expected_calibration_error",
    "f_score",
    "fit_bias",
    "host_confusion",
    "ious",
    "mean",
    "precision_recall_f1",
    "reliability",
    "segmentation_summary",
    "surface_summary",
    "surfaces",
    "transition_summary",
    "transitions",
    "trimap",
]
