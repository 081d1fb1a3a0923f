"""Images of any number of bands, of 8 bits, 16 bits or floating point.

Arrays `[H, W, C]` in the units of their files; nothing is scaled to 8 bits but pictures for people.
"""

import dataclasses
import io
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import cv2
import numpy as np

from dilaff_jax.data import raster
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError

ARRAY_SUFFIXES = (".npy", ".npz")
# As what numbers are kept; as float32 whole ones up to 2^24 are exact.
_KEPT = {
    **{kind: kind for kind in ("uint8", "uint16", "int16", "float32")},
    "int8": "int16",
    **dict.fromkeys(("uint32", "int32", "uint64", "int64", "float16", "float64"), "float32"),
}
_EXACT = 1 << 24
# Pictures show a band from two deviations below its mean to two above.
_SHOWN = 2.0
# Of its four channels at a time OpenCV takes means of areas.
_AREA_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class Bands:
    """What is known of the bands of a data set's images, in the units of the files.

    mean, std: of each band, over the pixels of the training split that have data. shown: which
    bands, from 0, a picture has for red, green and blue.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shown: tuple[int, ...]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], shown: Sequence[int] = ()) -> Self:
        """From a config: `shown` are numbers of bands from 1, () for the first three or the first.

        Raises:
            UserError: a band is to be shown that there is not.
        """
        count = len(mean)
        chosen = tuple(shown) or ((1, 2, 3) if count >= 3 else (1,))
        if max(chosen) > count:
            raise UserError(
                f"config.data.shown_bands is {tuple(shown)}, and the images have {count} bands"
            )
        places = tuple(n - 1 for n in chosen)
        return cls(tuple(map(float, mean)), tuple(map(float, std)), places * (3 // len(places)))

    @property
    def count(self) -> int:
        """C."""
        return len(self.mean)

    def filled(self, values: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
        """`[H, W, C]` with the mean of a band where it has no data (`missing`, of that shape)."""
        if missing is None:
            return values
        mean = np.asarray(self.mean)
        mean = np.rint(mean) if values.dtype.kind in "ui" else mean
        return np.where(missing, mean.astype(values.dtype), values)

    def picture(self, values: np.ndarray) -> np.ndarray:
        """`[..., C]` as RGB uint8 `[..., 3]`, from two deviations below the mean to two above."""
        places = list(self.shown)
        mean, std = (np.asarray(v, np.float32)[places] for v in (self.mean, self.std))
        deviations = (values[..., places].astype(np.float32) - mean) / std
        return np.clip(127.5 * (1 + deviations / _SHOWN) + 0.5, 0, 255).astype(np.uint8)

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {name: list(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """From what `to_json` gave."""
        return cls(**{name: tuple(value) for name, value in content.items()})


def with_bands(config: Any, mean: Sequence[float], std: Sequence[float], ndim: int = 2) -> Any:
    """A copy of a whole config for images, or volumes, of these bands.

    A network that is said to be of volumes stays so, and is refused where there are images.
    """
    config = config.copy_and_resolve_references()
    options = config.model.encoder_options
    with config.unlocked(), config.ignore_type():
        config.data.bands = len(mean)
        config.model.ndim = max(ndim, config.model.get("ndim", 2))
        options.mean = options.get("mean", tuple(mean))
        options.std = options.get("std", tuple(std))
    return config


class Loaded(NamedTuple):
    """An image as read.

    Attributes:
        values: `[H, W, C]`.
        missing: where there is no data, bool `[H, W, C]`: NaN, and what a GeoTIFF says to be so;
            None where nothing is.
        nan: where there is NaN that the file does not say to be no data, bool; None for nowhere.
    """

    values: np.ndarray
    missing: np.ndarray | None
    nan: np.ndarray | None


class Moments:
    """Number, mean and deviation of the values of each band, image after image.

    Merged as Chan, Golub and LeVeque (1983) do, so that no digits are lost to large means.
    """

    def __init__(self) -> None:
        self._count = self._mean = self._squares = np.zeros(0)

    def add(self, values: np.ndarray, missing: np.ndarray | None) -> None:
        """Counts an image `[H, W, C]`, without the values that are missing."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        there = np.ones(flat.shape, bool) if missing is None else ~missing.reshape(flat.shape)
        count = there.sum(axis=0).astype(np.float64)
        mean = np.where(there, flat, 0).sum(axis=0) / np.maximum(count, 1)
        squares = (np.where(there, flat - mean, 0) ** 2).sum(axis=0)
        self._merge(count, mean, squares)

    def _merge(self, count: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
        if not self._count.size:
            self._count, self._mean, self._squares = count, mean, squares
            return
        total = np.maximum(self._count + count, 1)
        step = mean - self._mean
        self._squares = self._squares + squares + step**2 * self._count * count / total
        self._mean = self._mean + step * count / total
        self._count = self._count + count

    def to_json(self) -> dict[str, list[float]]:
        """Count, mean and deviation of each band."""
        deviation = np.sqrt(self._squares / np.maximum(self._count, 1))
        named = {"count": self._count, "mean": self._mean, "std": deviation}
        return {name: values.tolist() for name, values in named.items()}

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
        """What `to_json` gave of several splits, of all of them together."""
        together = cls()
        for part in parts:
            count, mean, std = (np.asarray(part[k], np.float64) for k in ("count", "mean", "std"))
            together._merge(count, mean, std**2 * count)
        return together.to_json()


def load(path: pathlib.Path) -> Loaded:
    """Reads the bands of a file.

    8 and 16 bits and float32 stay as they are; larger numbers become float32. An alpha channel is
    a band as any: many files call near infrared so.

    Args:
        path: a TIFF, GeoTIFF, or what else GDAL reads; or `.npy`, `.npz` of one array, `[H, W, C]`
            or `[H, W]`. No pickle is read.

    Raises:
        DataError: a damaged file, or numbers that are none of a band.
        UserError: rasterio is not installed.
    """
    with open_windows(path) as file:
        return checked(file.read(*file.all), file.no_data, path)


def array(path: pathlib.Path) -> np.ndarray:
    """The one array of a `.npy` or `.npz`, of any shape; mapped, where its form allows.

    Raises:
        DataError: it is damaged, holds several arrays, or objects, which would be executed.
    """
    try:
        # Mapped: the system keeps in memory only what is used.
        mode: Any = "r" if path.suffix.lower() == ".npy" else None
        opened = np.load(path, mmap_mode=mode, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            return opened
        if len(opened.files) != 1:
            raise DataError(f"{path}: holds {len(opened.files)} arrays; save one alone")
        return opened[opened.files[0]]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no array that can be read: {error}") from error


def open_windows(path: pathlib.Path) -> "raster.Bands | ArrayFile":
    """The file of `load`, of which windows can be read. Raises as `load`."""
    return ArrayFile(path) if path.suffix.lower() in ARRAY_SUFFIXES else raster.Bands(path)


def size_of(path: pathlib.Path) -> tuple[int, int]:
    """Height and width, without reading more than the header where the form of the file allows."""
    with open_windows(path) as file:
        return file.size


def checked(
    values: np.ndarray, no_data: Sequence[float | None] | None, path: pathlib.Path
) -> Loaded:
    """Values as they are kept, and where they are missing; a part of a file, or all of it.

    Args:
        values: `[H, W, C]` as in the file.
        no_data: of each band the value that stands for it; None for none.
        path: of the file, for messages.

    Raises:
        DataError: numbers that are none of a band.
    """
    kept = _KEPT.get(values.dtype.name)
    if kept is None or not values.size:
        raise DataError(
            f"{path}: numbers of type {values.dtype}, shape {values.shape}; expected an image of "
            f"{', '.join(_KEPT)}"
        )
    missing, declared = np.zeros(values.shape, bool), np.zeros(values.shape[-1], bool)
    for place, value in enumerate(no_data or ()):
        if value is not None and np.isnan(value):
            declared[place] = True
        elif value is not None:
            missing[..., place] = values[..., place] == value
    nan = np.isnan(values) if values.dtype.kind == "f" else np.zeros_like(missing)
    missing |= nan
    nan &= ~declared
    if kept == "float32" and values.dtype.kind in "ui":
        used = values[~missing]
        largest = max(abs(int(used.min())), abs(int(used.max()))) if used.size else 0
        if largest > _EXACT:
            raise DataError(
                f"{path}: a value of {largest}; whole numbers are kept as float32, which are exact "
                f"up to {_EXACT}: scale them"
            )
    with np.errstate(over="ignore"):
        values = values.astype(kept)
    if kept == "float32":
        bad = np.argwhere(~np.isfinite(values) & ~missing)
        if len(bad):
            *place, band = bad[0].tolist()
            raise DataError(
                f"{path}: {len(bad)} values are infinite, or too large for float32, first in band "
                f"{band + 1} at {tuple(place)}; replace them, by NaN if there is nothing"
            )
    return Loaded(values, missing if missing.any() else None, nan if nan.any() else None)


class ArrayFile:
    """A `.npy` or `.npz` of one array, in the form of `raster.Bands`. A context manager.

    Raises:
        DataError: as `array`; it is not `[H, W, C]` or `[H, W]`.
    """

    no_data: Sequence[float | None] | None = None

    def __init__(self, path: pathlib.Path) -> None:
        opened = array(path)
        if opened.ndim == 2:
            opened = opened[..., None]
        if opened.ndim != 3 or not opened.size:
            raise DataError(f"{path}: an array of shape {opened.shape}; expected [H, W, C]")
        self._values = opened
        self.size: tuple[int, int] = (opened.shape[0], opened.shape[1])
        self.count: int = opened.shape[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._values

    @property
    def all(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Its rows and columns, for `read`."""
        return (0, self.size[0]), (0, self.size[1])

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """All bands of these rows and columns, from the first up to before the second."""
        return np.array(self._values[slice(*rows), slice(*columns)])

    def reduced(self, height: int, width: int) -> np.ndarray:
        """The whole at another size, of nearest values."""
        rows, columns = (
            (2 * np.arange(m) + 1) * n // (2 * m)
            for n, m in zip(self.size, (height, width))  # noqa: B905
        )
        return np.array(self._values[np.ix_(rows, columns)])

    def georeference(self) -> dict[str, Any]:
        """{}: an array lies nowhere on earth."""
        return {}


def packed(**arrays: np.ndarray) -> bytes:
    """Arrays by name as the bytes of a `.npz`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, np.ndarray]:
    """What `packed` wrote. Raises DataError if it is damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"damaged record: {len(data)} bytes are no arrays: {error}") from error


def encode(values: np.ndarray, missing: np.ndarray | None) -> bytes:
    """An image as a `.npz`, losslessly: `values`, and `missing` as bits where there are any."""
    bits = {} if missing is None else {"missing": np.packbits(missing, axis=-1)}
    return packed(values=values, **bits)


def decode(data: bytes, bands: Bands) -> np.ndarray:
    """What `encode` wrote, `[H, W, C]`, filled where values are missing.

    Raises:
        DataError: damaged, or of another number of bands.
    """
    arrays = unpacked(data)
    values, bits = arrays["values"], arrays.get("missing")
    if values.shape[-1] != bands.count:
        raise DataError(f"an image of {values.shape[-1]} bands, not {bands.count}")
    missing = None
    if bits is not None:
        missing = np.unpackbits(bits, axis=-1, count=bands.count).astype(bool)
    return bands.filled(values, missing)


def resized(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """OpenCV's resizing of `[H, W, C]` of any C to (height, width)."""
    channels, shape = image.shape[-1], (*size, image.shape[-1])
    step = _AREA_CHANNELS if interpolation == cv2.INTER_AREA else channels
    parts = [
        cv2.resize(np.ascontiguousarray(part), size[::-1], interpolation=interpolation)
        for part in np.split(image, range(step, channels, step), axis=-1)
    ]
    if len(parts) == 1:
        return parts[0].reshape(shape)
    return np.concatenate([p.reshape(*size, -1) for p in parts], axis=-1)


def photometric(image: np.ndarray, bands: Bands, rng: np.random.Generator) -> np.ndarray:
    """Random brightness (±½ deviation of each band) and contrast (×0.5 to 1.5 about its mean).

    Each with probability ½, of all bands alike; hue and saturation are of colours only. Our choice.

    Args:
        image: `[H, W, C]`, not changed.
        bands: their means and deviations.
        rng: Source of randomness.

    Returns:
        `[H, W, C]` of the same numbers; whole ones are rounded, and end where theirs do.
    """
    use = rng.random(2) < 0.5
    shift, factor = rng.uniform([-0.5, 0.5], [0.5, 1.5])
    if not use.any():
        return image
    mean, std = (np.asarray(v, np.float32) for v in (bands.mean, bands.std))
    values = image.astype(np.float32)
    if use[1]:
        values = (values - mean) * np.float32(factor) + mean
    if use[0]:
        values = values + np.float32(shift) * std
    if image.dtype.kind not in "ui":
        return values.astype(image.dtype)
    limits = np.iinfo(image.dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(image.dtype)
