"""How far the surfaces of a segmented volume lie from the true ones, in millimetres.

The surface of a class are its voxels that have a neighbour along an axis of another class, or lie
at the side of the volume. Distances are between their centres, by SciPy's exact transform, with the
size of a voxel along each axis. So MedPy and most challenges have it; DeepMind's `surface-distance`
weighs voxels by the area of the surface in them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jax.typing import ArrayLike
from jaxtyping import Integer

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.metrics.boundary import check_maps
from dilaff_jax.metrics.regions import divide, mean

# The share of the distances that the Hausdorff distance leaves out.
_PERCENTILE = 95


class Surfaces(NamedTuple):
    """Counts of `surfaces`, of a class each; sums over volumes.

    Attributes:
        dice: float64 `[C]`: sum of the Dice of regions.
        surface_dice: float64 `[C]`: sum of the surface Dice.
        hausdorff: float64 `[C]`: sum of the 95 % Hausdorff distances, in millimetres.
        volumes: int64 `[C]`: in which the class is, true or predicted.
    """

    dice: np.ndarray
    surface_dice: np.ndarray
    hausdorff: np.ndarray
    volumes: np.ndarray


def surfaces(
    pred: Integer[ArrayLike, " *spatial"],
    labels: Integer[ArrayLike, " *spatial"],
    num_classes: int,
    spacing: Sequence[float],
    tolerance: float,
    ignore_label: int = IGNORE_LABEL,
) -> Surfaces:
    """Dice, surface Dice and 95 % Hausdorff distance of each class of one volume.

    Surface Dice at τ is the share of the voxels of both surfaces that lie within τ of the other
    (Nikolov et al. 2018, https://arxiv.org/abs/1809.04430, by voxels); the Hausdorff distance is
    the 95th percentile of all these distances. Where a class is in one of the two alone, the Dice
    are 0 and the distance is the diagonal of the volume (our choice); where it is in neither, it
    counts nowhere. Void voxels are of no class in either.

    Args:
        pred: classes, `[*spatial]`.
        labels: classes or `ignore_label`, `[*spatial]`.
        num_classes: C.
        spacing: size of a voxel along each axis, in millimetres.
        tolerance: τ, in millimetres.
        ignore_label: the label of voxels that do not count.

    Raises:
        UserError: shapes that do not match, impossible labels, a spacing that is none.
    """
    pred, labels = check_maps(pred, labels, num_classes, ignore_label)
    if len(spacing) != labels.ndim or min(spacing) <= 0:
        raise UserError(f"spacing is {tuple(spacing)}; expected {labels.ndim} sizes above 0")
    pred = np.where(labels == ignore_label, ignore_label, pred)
    dice, surface_dice, hausdorff = np.zeros((3, num_classes))
    counts = Surfaces(dice, surface_dice, hausdorff, np.zeros(num_classes, np.int64))
    diagonal = float(np.linalg.norm(np.array(labels.shape) * spacing))
    for c in range(num_classes):
        found, true = pred == c, labels == c
        if not found.any() and not true.any():
            continue
        counts.volumes[c] = 1
        counts.dice[c] = 2 * (found & true).sum() / (found.sum() + true.sum())
        if not found.any() or not true.any():
            counts.hausdorff[c] = diagonal
            continue
        distances = _distances(found, true, spacing)
        counts.surface_dice[c] = np.mean(distances <= tolerance)
        counts.hausdorff[c] = np.percentile(distances, _PERCENTILE)
    return counts


def surface_summary(counts: Surfaces, names: Sequence[str]) -> dict[str, float]:
    """Means over volumes: `dice/NAME` and so on; `dice`, `surface_dice`, `hausdorff` of all.

    The means over classes leave out the first, the background. NaN for a class that is nowhere.
    """
    figures: dict[str, float] = {}
    for key in ("dice", "surface_dice", "hausdorff"):
        values = divide(getattr(counts, key), counts.volumes)
        figures[key] = float(mean(values[1:]))
        figures |= {f"{key}/{name}": float(v) for name, v in zip(names, values, strict=True)}
    return figures


def _distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """From each voxel of either surface to the other one, `[M]`."""
    here, there = _surface(a), _surface(b)
    to_a, to_b = (
        scipy.ndimage.distance_transform_edt(~surface, sampling=tuple(spacing))
        for surface in (here, there)
    )
    return np.concatenate([to_b[here], to_a[there]])


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~scipy.ndimage.binary_erosion(mask)
