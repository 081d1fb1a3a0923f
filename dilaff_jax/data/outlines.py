"""Polygons as pixels, drawn by pycocotools."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dilaff_jax.data.images import DataError
from dilaff_jax.errors import MissingPackageError

# How many pixels a polygon may leave the image by: tools round to the border and beyond.
_SLACK = 1.0


def library() -> Any:
    """pycocotools.mask. Raises MissingPackageError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingPackageError("this needs the extra: pip install 'dilaff-jax[coco]'") from error
    return mask


def inside_of(
    polygons: Sequence[np.ndarray], size: tuple[int, int], where: str, cut: bool
) -> np.ndarray:
    """The pixels that polygons cover together, as pycocotools draws them: bool `[H, W]`.

    Args:
        polygons: x and y in turn, in pixels.
        size: height and width.
        where: of which annotation, for messages.
        cut: use what is inside of polygons that leave the image.

    Raises:
        DataError: it is no polygon, or leaves the image.
    """
    coco = library()
    height, width = size
    if any(p.ndim != 1 or len(p) < 6 or len(p) % 2 or not np.isfinite(p).all() for p in polygons):
        raise DataError(f"{where}: a polygon needs three points or more, x and y in turn")
    points = np.concatenate(polygons).reshape(-1, 2)
    beyond = max(0.0, -points.min(), *(points - (width, height)).max(axis=0))
    if beyond > _SLACK and not cut:
        raise DataError(
            f"{where} leaves its image of {height} x {width} (height x width) by {beyond:.0f} "
            "pixels; mend it, or give --outside cut to use what is inside"
        )
    # Drawn with room on all sides: beyond its canvas pycocotools draws wrongly.
    room = int(np.ceil(beyond)) + 1
    moved = [(p.reshape(-1, 2) + room).ravel().tolist() for p in polygons]
    parts = coco.frPyObjects(moved, height + 2 * room, width + 2 * room)
    covered = coco.decode(coco.merge(parts)).astype(bool)
    return covered[room : room + height, room : room + width]
