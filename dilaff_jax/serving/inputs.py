"""Images as people give them, and as a network takes them: colours of 8 bits, or bands."""

import dataclasses
import os
import pathlib
from typing import Any, Self, TypeAlias

import numpy as np

from dilaff_jax.data import bands as bands_lib
from dilaff_jax.data import images, volumes
from dilaff_jax.data.bands import Bands
from dilaff_jax.data.images import DataError
from dilaff_jax.data.raster import Raster
from dilaff_jax.errors import UserError
from dilaff_jax.serving.network import Network


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """An image.

    Attributes:
        pixels: what a network takes, `[H, W, C]`; of volumes `[D, H, W, C]`.
        picture: RGB uint8 `[H, W, 3]`, for people; of a volume of its middle slice.
        there: where it has data, bool `[*spatial]`; None for everywhere.
        place: of a volume, where it lies; None of an image.
    """

    pixels: np.ndarray
    picture: np.ndarray
    there: np.ndarray | None = None
    place: volumes.Place | None = None


ImageLike: TypeAlias = str | os.PathLike | np.ndarray | Seen


def read(image: ImageLike, network: Network) -> Seen:
    """A file or an array for a network.

    Args:
        image: a file; an array, RGB uint8 `[H, W, 3]`, or `[H, W, C]` of its bands in the units of
            the training images, or a volume `[D, H, W, C]` or `[D, H, W]`, NaN where there is no
            data; or what this function gave.
        network: that is to see it.

    Raises:
        DataError: the file is not a readable image, or one of other bands.
        UserError: the array is no such image.
    """
    if isinstance(image, Seen):
        return image
    bands = network.bands
    if bands is not None and network.ndim == 3:
        return _volume(image, bands, network.normalise)
    if bands is None:
        pixels = read_image(image)
        return Seen(pixels, pixels)
    if isinstance(image, str | os.PathLike):
        path = pathlib.Path(image)
        loaded = bands_lib.load(path)
        _check_count(loaded.values.shape[-1], bands, str(path))
    else:
        values = np.asarray(image)
        if values.ndim != 3 or values.shape[-1] != bands.count:
            raise UserError(
                f"image has shape {values.shape}; this model takes {bands.count} bands, "
                f"[H, W, {bands.count}], in the units of the images that it was trained on"
            )
        loaded = bands_lib.checked(values, None, pathlib.Path("image"))
    pixels = bands.filled(loaded.values.astype(np.float32), loaded.missing)
    return Seen(pixels, bands.picture(pixels), _there(loaded.missing))


def _volume(image: Any, bands: Bands, normalise: volumes.Normalisation) -> Seen:
    if isinstance(image, str | os.PathLike):
        volume, what = volumes.load(pathlib.Path(image)), str(image)
    else:
        values = volumes.checked(np.asarray(image), pathlib.Path("the volume"))
        volume, what = volumes.Volume(*values, volumes.Place("", (1.0, 1.0, 1.0))), "the volume"
    _check_count(volume.values.shape[-1], bands, what)
    pixels = volumes.normalised(volume.values, normalise)
    picture = bands.picture(volumes.middle(pixels))
    return Seen(pixels, picture, _there(volume.missing), volume.place)


def read_image(image: ImageLike) -> np.ndarray:
    """RGB uint8 `[H, W, 3]` of a file (EXIF orientation applied), or of an array as it is.

    Raises:
        DataError: the file is not a readable image.
        UserError: the array is not RGB uint8 `[H, W, 3]`.
    """
    if isinstance(image, str | os.PathLike):
        return images.decode_image(images.load_image(image)[0])
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"image has shape {pixels.shape} and dtype {pixels.dtype}; expected RGB uint8 "
            "[H, W, 3] (grey: repeat the channel; floats in [0, 1]: multiply by 255; OpenCV's "
            "BGR: image[..., ::-1])"
        )
    return pixels


class BandWindows:
    """An image of bands in a file, in the form of `raster.Raster`; filled where it has no data.

    Raises:
        DataError: the file cannot be read, or has other bands.
    """

    def __init__(self, path: pathlib.Path, bands: Bands) -> None:
        self._file, self._path, self._bands = bands_lib.open_windows(path), path, bands
        try:
            _check_count(self._file.count, bands, str(path))
        except DataError:
            self._file.__exit__(None, None, None)
            raise
        self.size = self._file.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Float32 of these rows and columns, from the first up to before the second."""
        return self._filled(self._file.read(rows, columns))

    def is_there(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Where the file has an image: bool, False where all bands are without data."""
        values = self._file.read(rows, columns)
        there = _there(bands_lib.checked(values, self._file.no_data, self._path).missing)
        return np.ones(values.shape[:2], bool) if there is None else there

    def small(self, longest: int) -> np.ndarray:
        """A picture of the whole, its longer side of at most so many pixels: RGB uint8."""
        factor = min(1.0, longest / max(self.size))
        height, width = (max(1, round(factor * n)) for n in self.size)
        return self._bands.picture(self._filled(self._file.reduced(height, width)))

    def georeference(self) -> dict[str, Any]:
        """See `raster.Bands`."""
        return self._file.georeference()

    def _filled(self, values: np.ndarray) -> np.ndarray:
        loaded = bands_lib.checked(values, self._file.no_data, self._path)
        return self._bands.filled(loaded.values.astype(np.float32), loaded.missing)


Windows: TypeAlias = Raster | BandWindows


def windows(path: pathlib.Path, bands: Bands | None) -> Windows:
    """The windows of a file, of these bands or of RGB. Raises as `read`."""
    return Raster(path) if bands is None else BandWindows(path, bands)


def _there(missing: np.ndarray | None) -> np.ndarray | None:
    """Where any band has data, `[H, W]`; None for everywhere."""
    return None if missing is None else np.logical_not(missing.all(axis=-1))


def _check_count(found: int, bands: Bands, what: str) -> None:
    if found != bands.count:
        raise DataError(
            f"{what}: {found} bands, and this model takes {bands.count}; give those that it was "
            "trained on, in their order (gdal_translate -b 1 -b 2 ... chooses some)"
        )
