"""Large rasters, read and written window by window: TIFF, GeoTIFF, and what else GDAL reads."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.runtime import files

# Bytes that GDAL may keep of what it has read; by default it takes a share of the memory.
_CACHE = 64 * 2**20
_BLOCK = 512


class Bands:
    """The bands of a raster in a file, of which windows are read. A context manager.

    Args:
        path: of the file.

    Attributes:
        size: height and width.
        count: of bands.
        dtype: of their numbers.
        no_data: of each band the value that stands for it, None for none.

    Raises:
        UserError: rasterio is not installed.
        DataError: GDAL cannot read the file, or its bands are of different numbers.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._library = _rasterio()
        self._path = path
        self._open = contextlib.ExitStack()
        self._open.enter_context(_quiet(self._library))
        try:
            self._file: Any = self._open.enter_context(self._library.open(path))
            kinds = sorted(set(self._file.dtypes))
            if len(kinds) != 1:
                raise DataError(f"{path}: bands of different numbers, {', '.join(kinds)}")
            self.dtype = np.dtype(kinds[0])
            self.count: int = self._file.count
            self.no_data: tuple[float | None, ...] = self._file.nodatavals
            self.size: tuple[int, int] = (self._file.height, self._file.width)
            self._check()
        except self._library.errors.RasterioError as error:
            self._open.close()
            raise DataError(f"{path}: not a raster that can be read: {error}") from error
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    @property
    def all(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Its rows and columns, for `read`."""
        return (0, self.size[0]), (0, self.size[1])

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """All bands of these rows and columns, from the first up to before the second."""
        return np.moveaxis(self._read(None, window=self._window(rows, columns)), 0, -1)

    def reduced(self, height: int, width: int) -> np.ndarray:
        """All bands of the whole at another size."""
        return np.moveaxis(self._read(None, out_shape=(self.count, height, width)), 0, -1)

    def georeference(self) -> dict[str, Any]:
        """What says where on earth the pixels lie, in rasterio's terms; {} where nothing does."""
        given: dict[str, Any] = {}
        if not self._file.transform.is_identity:
            given["transform"] = self._file.transform
        points, reference = self._file.gcps
        if points:
            given["gcps"] = points
        if self._file.crs or reference:
            given["crs"] = self._file.crs or reference
        return given

    def _check(self) -> None:
        """Raises DataError for bands that are not meant."""

    def _window(self, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
        return self._library.windows.Window.from_slices(rows, columns)

    def _read(self, bands: list[int] | None, **part: Any) -> np.ndarray:
        with self._damage():
            return self._file.read(bands, **part)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except self._library.errors.RasterioError as error:
            raise DataError(f"{self._path}: damaged or cut off: {error}") from error


class Raster(Bands):
    """An image of 8 bits in a file, of which windows are read as colours.

    Grey is repeated, a palette looked up, and a fourth band that is alpha says where there is an
    image, as a value for "no data" does.

    Raises:
        DataError: it has other bands or numbers.
    """

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """RGB uint8 of these rows and columns, from the first up to before the second."""
        return self._colours(window=self._window(rows, columns))

    def is_there(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Where the file has an image: bool, False for "no data" and full transparency."""
        with self._damage():
            return self._file.dataset_mask(window=self._window(rows, columns)) > 0

    def small(self, longest: int) -> np.ndarray:
        """The whole image, its longer side of at most so many pixels: RGB uint8."""
        factor = min(1.0, longest / max(self.size))
        height, width = (max(1, round(factor * n)) for n in self.size)
        return self._colours(out_shape=(self._colour_bands(), height, width))

    def _check(self) -> None:
        if self._file.tags().get("EXIF_Orientation", "1") != "1":
            raise DataError(
                f"{self._path}: a camera turned it (EXIF orientation), and tiles are not; save "
                "it upright"
            )
        if self.dtype != np.uint8:
            raise DataError(
                f"{self._path}: numbers of type {self.dtype}; tiles are read of 8 bits. Which are "
                "black and white nobody knows: scale them, as with gdal_translate -ot Byte -scale "
                "LOW HIGH 0 255"
            )
        if self._colour_bands() not in (1, 3):
            raise DataError(
                f"{self._path}: {self.count} bands; expected one, or three of red, green and blue, "
                "and perhaps alpha. gdal_translate -b 1 -b 2 -b 3 chooses some"
            )

    def _colour_bands(self) -> int:
        return self.count - (self._file.colorinterp[-1].name == "alpha")

    def _colours(self, **part: Any) -> np.ndarray:
        bands = self._colour_bands()
        pixels = self._read(list(range(1, bands + 1)), **part)
        if bands == 3:
            return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        if self._file.colorinterp[0].name == "palette":
            palette = np.zeros((256, 3), np.uint8)
            for index, colour in self._file.colormap(1).items():
                palette[index] = colour[:3]
            return palette[pixels[0]]
        return np.repeat(pixels[0][..., None], 3, axis=-1)


@contextlib.contextmanager
def label_file(
    path: pathlib.Path,
    size: tuple[int, int],
    colours: np.ndarray,
    georeference: Mapping[str, Any],
) -> Iterator[Any]:
    """Yields write(row, column, labels) for a GeoTIFF of labels; it has its name once it is whole.

    Args:
        path: of the file.
        size: height and width.
        colours: of the classes, RGB uint8 `[C, 3]`, its palette.
        georeference: of `Raster.georeference`.
    """
    library = _rasterio()
    with (
        files.replacing(path, keep_suffix=True) as part,
        _quiet(library),
        library.open(
            part,
            "w",
            driver="GTiff",
            height=size[0],
            width=size[1],
            count=1,
            dtype="uint8",
            nodata=IGNORE_LABEL,
            compress="deflate",
            tiled=True,
            blockxsize=_BLOCK,
            blockysize=_BLOCK,
            bigtiff="if_safer",
            **{k: v for k, v in georeference.items() if k in ("crs", "transform")},
        ) as file,
    ):
        if "gcps" in georeference:
            file.gcps = (georeference["gcps"], georeference.get("crs"))
        file.write_colormap(1, {i: tuple(map(int, c)) for i, c in enumerate(colours)})

        def write(row: int, column: int, labels: np.ndarray) -> None:
            height, width = labels.shape
            window = library.windows.Window(column, row, width, height)
            file.write(labels, 1, window=window)

        yield write


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """GDAL with a small cache; a picture without georeference is no reason for a warning."""
    with library.Env(GDAL_CACHEMAX=_CACHE), warnings.catch_warnings():
        warnings.simplefilter("ignore", library.errors.NotGeoreferencedWarning)
        yield


def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
        import rasterio.windows
    except ImportError as error:
        raise UserError(
            "rasters are read and written by rasterio: pip install -e '.[geo]'"
        ) from error
    return rasterio
