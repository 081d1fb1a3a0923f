"""Other networks' results of images that do not fit into memory, read window by window."""

import contextlib
import pathlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from tqdm import tqdm

from dilaff_jax.data import raster
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.serving import foreign_files
from dilaff_jax.serving.foreign_files import Form

# Bytes that are looked at together where a file is looked through.
_BYTES = 2**26


class _Values(Protocol):
    """shape: (h, w, C). read(rows, columns): `[rows, columns, C]`, or labels `[rows, columns]`."""

    shape: tuple[int, int, int]

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray: ...


class Scores:
    """Logits of one image in a file, of which windows are read. A context manager.

    Args:
        path: `.npy`, or a raster: a band of labels, or a band of floating point for each class.
        form: see `foreign_files.Form`.
        size: height and width of the image.

    Attributes:
        stride: pixels of the image that a value stands for, on either side.
        num_classes: C.

    Raises:
        DataError: the file cannot be read so, or holds what cannot be meant.
    """

    def __init__(self, path: pathlib.Path, form: Form, size: Sequence[int]) -> None:
        self._path, self._confidence = path, form.confidence
        if path.suffix.lower() == ".npz":
            raise DataError(f"{path}: windows of a .npz cannot be read; save the array as .npy")
        with contextlib.ExitStack() as opened:
            self._values: _Values = (
                _Array(path, form)
                if path.suffix.lower() == ".npy"
                else _Bands(opened.enter_context(raster.Bands(path)), path, form)
            )
            height, width, self.num_classes = self._values.shape
            self.stride = size[0] // max(height, 1)
            if (height * self.stride, width * self.stride) != tuple(size):
                raise DataError(
                    f"{path}: {height} x {width} values for an image of {size[0]} x {size[1]} "
                    "pixels; in tiles a value stands for a whole number of pixels, the same on "
                    "both sides: enlarge them to the image"
                )
            self._is_logarithm = self._look_through()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Logits of these values, from the first up to before the second: float32 `[h, w, C]`."""
        values = self._values.read(rows, columns)
        if values.ndim == 2 and self._confidence is not None:
            return foreign_files.of_labels(values, self._confidence, self.num_classes)
        values = values.astype(np.float32)
        return values if self._is_logarithm else foreign_files.logarithm(values)

    def _look_through(self) -> bool:
        """Checks all values; whether they are logits, not probabilities."""
        height, width, classes = self._values.shape
        probabilities = True
        rows = max(1, _BYTES // (4 * width * classes))
        starts = range(0, height, rows)
        for start in tqdm(starts, desc=f"checking {self._path.name}", unit="rows", leave=False):
            values = self._values.read((start, min(start + rows, height)), (0, width))
            if values.ndim == 2:
                foreign_files.check_labels(values, classes, self._path)
                continue
            values = values.astype(np.float32)
            foreign_files.check_values(values, self._path)
            probabilities &= foreign_files.are_probabilities(values)
        return not probabilities


class _Array:
    """A `.npy`, in the memory of which the system keeps only what is used."""

    def __init__(self, path: pathlib.Path, form: Form) -> None:
        self._array = foreign_files.classes_last(foreign_files.mapped(path), path, form)
        self.shape = self._array.shape

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        return self._array[slice(*rows), slice(*columns)]


class _Bands:
    """A raster of labels, or with a band for each class."""

    def __init__(self, file: raster.Bands, path: pathlib.Path, form: Form) -> None:
        self._file = file
        count, kind = self._file.count, self._file.dtype
        self._are_labels = count == 1 and kind.kind in "ui"
        if not self._are_labels and kind.kind != "f":
            raise DataError(
                f"{path}: {count} bands of {kind}; expected one of labels, or one of floating "
                "point for each class"
            )
        if self._are_labels:
            foreign_files.confidence_of(path, form)
        classes = form.num_classes or (0 if self._are_labels else count)
        if not self._are_labels and count != classes:
            raise DataError(f"{path}: {count} bands; expected one for each of {classes} classes")
        self.shape = (*self._file.size, classes)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        values: Any = self._file.read(rows, columns)
        return values[..., 0] if self._are_labels else values


def number_of_classes(path: pathlib.Path, form: Form) -> int:
    """How many classes a file is of, where the model takes any.

    Raises:
        UserError: nobody says.
    """
    if path.suffix.lower() == ".npy":
        return foreign_files.count_classes(path, form)
    with raster.Bands(path) as bands:
        if bands.dtype.kind == "f":
            return bands.count
    raise UserError(
        f"{path}: of label maps nobody knows how many classes there are, and this model takes any; "
        "in tiles give probabilities"
    )
