"""Volumes in files: NIfTI, TIFF stacks and arrays, with the size of a voxel and its place.

Arrays are `[D, H, W, C]`, the axes of a NIfTI in the order of its nearest canonical orientation
(right, anterior, superior), whatever its own.
"""

import gzip
import pathlib
import zlib
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from dilaff_jax.data import bands, folders
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files

NIFTI = (".nii.gz", ".nii")
_STACKS = (".tif", ".tiff")
SUFFIXES = (*NIFTI, *_STACKS, *bands.ARRAY_SUFFIXES)
Normalisation: TypeAlias = Literal["zscore", "percentiles", "none"]
# Between these percentiles values are brought to [0, 1]; our choice, as many toolboxes have it.
_PERCENTILES = (0.5, 99.5)
# What affines of one volume may differ by, in millimetres.
_SAME = 1e-3


class Place(NamedTuple):
    """What a label map needs to lie where its volume does.

    Attributes:
        suffix: of the file.
        spacing: size of a voxel along each axis, in millimetres (or what the file means).
        affine: from voxels to millimetres, `[4, 4]`, of the canonical axes; None where the file has
            none.
        own: from the file's own voxels, which may have other axes.
    """

    suffix: str
    spacing: tuple[float, float, float]
    affine: np.ndarray | None = None
    own: np.ndarray | None = None


class Volume(NamedTuple):
    """A volume as read.

    Attributes:
        values: `[D, H, W, C]`; NaN is replaced by the mean of its channel's other values.
        missing: where it was, bool `[D, H, W, C]`; None for nowhere.
        place: where it lies.
    """

    values: np.ndarray
    missing: np.ndarray | None
    place: Place


def load(path: pathlib.Path, spacing: tuple[float, ...] = ()) -> Volume:
    """Reads a volume.

    Args:
        path: NIfTI (a fourth axis is channels), a TIFF stack `[D, H, W]`, or `.npy`, `.npz` of one
            array `[D, H, W]` or `[D, H, W, C]`.
        spacing: of files that are no NIfTI, along their axes; () for 1 each.

    Raises:
        DataError: a damaged file, or one that is no volume, or whose spacing cannot be.
        UserError: a package is not installed.
    """
    kind = folders.suffix_of(path.name, SUFFIXES).lower()
    given = spacing or (1.0, 1.0, 1.0)
    place = Place(kind, (given[0], given[1], given[2]))
    if kind in NIFTI:
        values, place = _nifti(path, kind)
    elif kind in _STACKS:
        values = _stack(path)
    elif kind:
        values = bands.array(path)
    else:
        raise DataError(f"{path}: no volume by its name; known are {', '.join(SUFFIXES)}")
    return Volume(*checked(values, path), place)


def checked(values: np.ndarray, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`values` and `missing` of `Volume`, of an array `[D, H, W]` or `[D, H, W, C]`.

    Raises:
        DataError: it is no such array, or has infinite values.
    """
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4 or min(values.shape) < 1:
        raise DataError(
            f"{path}: an array of shape {values.shape}; expected a volume, [D, H, W] or "
            "[D, H, W, C]"
        )
    loaded = bands.checked(values, None, path)
    if loaded.missing is None:
        return loaded.values, None
    there = ~loaded.missing
    total = np.where(there, loaded.values, 0).sum(axis=(0, 1, 2), dtype=np.float64)
    mean = total / np.maximum(there.sum(axis=(0, 1, 2)), 1)
    filled = np.where(there, loaded.values, mean.astype(loaded.values.dtype))
    return filled, loaded.missing


def load_label(path: pathlib.Path) -> tuple[np.ndarray, Place]:
    """Reads a label map, int32 `[D, H, W]`, and where it lies.

    Raises:
        DataError: as `load`; several channels, or values that are not whole.
    """
    volume = load(path)
    values = volume.values
    if values.shape[-1] != 1:
        raise DataError(f"{path}: {values.shape[-1]} channels; a label map has one")
    if volume.missing is not None or (values != np.rint(values)).any():
        raise DataError(f"{path}: values that are not whole numbers; a label map holds classes")
    return values[..., 0].astype(np.int32), volume.place


def save_label(folder: pathlib.Path, name: str, labels: np.ndarray, place: Place) -> pathlib.Path:
    """Writes a label map `[D, H, W]` as its volume was: FOLDER/NAME and its suffix.

    A NIfTI has the volume's affine and order of axes, in uint8 and without scaling; of an array
    comes a `.npy`.
    """
    suffix = place.suffix if place.suffix in (*NIFTI, *_STACKS) else ".npy"
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = labels.astype(np.uint8)
    with files.replacing(path) as part, part.open("wb") as stream:
        if suffix in NIFTI:
            data = _as_nifti(values, place)
            stream.write(gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data)
        elif suffix in _STACKS:
            _library("tifffile").imwrite(stream, values)
        else:
            np.save(stream, values)
    return path


def middle(x: np.ndarray) -> np.ndarray:
    """The middle slice of `[D, H, W, ...]` across the last axis, upright, for people to look at.

    Canonical axes lead right, forward and up: it is axial, its first column left.
    """
    return np.rot90(x[:, :, x.shape[2] // 2])


def check_same_place(image: pathlib.Path, own: Place, label: pathlib.Path, other: Place) -> None:
    """Raises DataError for two affines that put the same voxels elsewhere."""
    if own.affine is None or other.affine is None:
        return
    distance = float(np.abs(own.affine - other.affine).max())
    if distance > _SAME:
        raise DataError(
            f"{label}: its affine differs from that of {image} by up to {distance:.3g}, so its "
            "voxels lie elsewhere; resample one to the other, or copy the header if it is wrong"
        )


def normalised(values: np.ndarray, how: Normalisation) -> np.ndarray:
    """Each channel of a volume by itself, float32.

    "zscore": (x - mean) / deviation; "percentiles": the 0.5th becomes 0 and the 99.5th 1, what is
    beyond is cut; "none": as it is. A channel of one value becomes 0.
    """
    values = values.astype(np.float32)
    if how == "none":
        return values
    space = tuple(range(values.ndim - 1))
    if how == "zscore":
        low, width = values.mean(axis=space, dtype=np.float64), values.std(space, np.float64)
    else:
        low, high = np.percentile(values, _PERCENTILES, axis=space)
        width = high - low
    scaled = (values - low) / np.where(width > 0, width, 1)
    scaled = np.where(width > 0, scaled, 0)
    return np.clip(scaled, 0, 1, dtype=np.float32) if how == "percentiles" else scaled.astype("f4")


def _nifti(path: pathlib.Path, kind: str) -> tuple[np.ndarray, Place]:
    nibabel = _library("nibabel")
    try:
        stored = nibabel.load(path)
        _check_spacing(_voxel(stored.affine), path)
        file = nibabel.as_closest_canonical(stored)
        values = np.asanyarray(file.dataobj)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as e:
        if isinstance(e, FileNotFoundError | DataError):
            raise
        raise DataError(f"{path}: no NIfTI that can be read (damaged or cut off): {e}") from e
    return values, Place(kind, _voxel(file.affine), np.asarray(file.affine), stored.affine)


def _voxel(affine: np.ndarray) -> tuple[float, float, float]:
    """The size of a voxel along each axis."""
    a, b, c = (float(n) for n in _library("nibabel").affines.voxel_sizes(affine))
    return a, b, c


def _check_spacing(spacing: tuple[float, ...], path: pathlib.Path) -> None:
    if not all(np.isfinite(n) and n > 0 for n in spacing):
        raise DataError(
            f"{path}: its voxels measure {spacing}; expected three sizes above 0: mend its header "
            "(the affine)"
        )


def _as_nifti(labels: np.ndarray, place: Place) -> bytes:
    nibabel = _library("nibabel")
    orientation = nibabel.orientations
    canonical = nibabel.Nifti1Image(labels, place.affine)
    turn = orientation.ornt_transform(
        orientation.io_orientation(place.affine), orientation.io_orientation(place.own)
    )
    turned = np.asarray(canonical.as_reoriented(turn).dataobj)
    return nibabel.Nifti1Image(turned, place.own).to_bytes()


def _stack(path: pathlib.Path) -> np.ndarray:
    tifffile = _library("tifffile")
    try:
        return np.asarray(tifffile.imread(path))
    except Exception as e:  # it raises of many kinds
        raise DataError(f"{path}: no TIFF stack that can be read: {e}") from e


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"volumes are read by {name}: pip install -e '.[volumes]'") from error
