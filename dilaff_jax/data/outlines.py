"""What annotations in JSON share: polygons as pixels, drawn by pycocotools, and checks."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dilaff_jax.data.images import DataError
from dilaff_jax.errors import MissingPackageError

# How many pixels a polygon may leave the image by: tools round to the border and beyond.
_SLACK = 1.0


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Raises DataError for an option that is none of those allowed."""
    if given not in allowed:
        raise DataError(f"--{name}={given}: want {' or '.join(map(repr, allowed))}")


def check_size(image: pathlib.Path, size: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Raises DataError for an image that has not the size of its annotation."""
    if size != annotated:
        raise DataError(
            f"{image}: the image is {size[0]} x {size[1]} (height x width, after any EXIF "
            f"rotation), its annotation is for {annotated[0]} x {annotated[1]}; annotate the "
            "image as it is, or export both anew"
        )


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
