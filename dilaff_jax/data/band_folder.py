r"""band_folder: your own images of any number of bands, and masks.

    python -m dilaff_jax.data.prepare --dataset band_folder --name fields \
        --source DIR --data_dir data

and then `config.dataset = "band_folder/fields"`. DIR is laid out as for image_folder, and the
options are its. Images are TIFF or GeoTIFF of as many bands as there are (rasterio: the extra
`geo`), or `.npy` and `.npz` of one array, `[H, W, C]` or `[H, W]`: 8 bits, 16 bits or floating
point, the same in all files. Nothing is scaled: the network gets each band minus its mean, divided
by its deviation, which are measured here on the training split.

What a GeoTIFF says to be no data is left out of both, and a pixel of which all bands are so is
ignored; elsewhere the missing values are the mean of their band. So are NaN with --nan=missing.
An alpha channel is a band as any: many files call near infrared so.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dilaff_jax.data import bands, builder, folders, image_folder
from dilaff_jax.data.bands import Bands, decode
from dilaff_jax.data.folders import Pair
from dilaff_jax.data.image_folder import option
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class BandOptions(image_folder.FolderOptions):
    """What the builder can be told."""

    nan: str = option("stop", "NaN in images: 'stop', or 'missing' for no data.")


class Builder(image_folder.Builder):
    """The splits of image_folder; see the module's docstring."""

    name = "band_folder"
    options_type: ClassVar[type[builder.Options]] = BandOptions
    options: BandOptions
    image_suffixes: ClassVar[Sequence[str]] = (*folders.IMAGE_SUFFIXES, *bands.ARRAY_SUFFIXES)
    has_bands: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, allowed in (("nan", ("stop", "missing")), ("image_bits", (0,))):
            if getattr(self.options, name) not in allowed:
                expected = " or ".join(map(str, allowed))
                raise DataError(f"--{name}={getattr(self.options, name)}: want {expected}")
        self._first: tuple[pathlib.Path, int, np.dtype] | None = None
        self._moments = bands.Moments()

    def features(self) -> dict[str, Any]:
        """Images as the bytes that `bands.encode` gives."""
        return super().features() | {"image": tfds.features.Text()}

    def read(self, item: Pair) -> builder.Example:
        """Reads one pair."""
        values, missing, nan = bands.load(item.image)
        label = self.read_mask(item)
        size = (values.shape[0], values.shape[1])
        if size != label.shape and values.shape[1:] == label.shape:
            raise DataError(
                f"{item.image}: an array of shape {values.shape}, whose bands seem to come first; "
                "save it as [H, W, C]: numpy.moveaxis(array, 0, -1)"
            )
        self.check_like_first(item.image, values.shape[-1], values.dtype)
        if nan is not None:
            self.check_nan(item.image, nan)
        if missing is not None and size == label.shape:  # other shapes are refused later
            label = np.where(missing.all(axis=-1), IGNORE_LABEL, label)
        self.count(values, missing)
        image = bands.encode(values, missing)
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def measured(self, split: str) -> dict[str, Any]:
        """Numbers, means and deviations of the bands of a split."""
        moments, self._moments = self._moments, bands.Moments()
        assert self._first is not None
        return {"bands": {"dtype": self._first[2].name, **moments.to_json()}}

    @staticmethod
    def decode_image(data: bytes, bands: Bands | None) -> np.ndarray:
        """The image of a record, `[H, W, C]`."""
        assert bands is not None
        return decode(data, bands)

    def count(self, values: np.ndarray, missing: np.ndarray | None) -> None:
        """Adds an image to what is measured."""
        self._moments.add(values, missing)

    def check_nan(self, path: pathlib.Path, nan: np.ndarray) -> None:
        """Raises DataError for NaN, `[*spatial, C]`, that nobody has said to be no data."""
        if self.options.nan == "stop":
            *place, band = np.argwhere(nan)[0].tolist()
            raise DataError(
                f"{path}: {nan.sum()} values are NaN, first in band {band + 1} at {tuple(place)}; "
                "--nan=missing takes them for no data, or replace them"
            )

    def check_like_first(self, path: pathlib.Path, count: int, kind: np.dtype) -> None:
        """Raises DataError for other bands than those of the first image."""
        if self._first is None:
            self._first = path, count, kind
        first, *expected = self._first
        if [count, kind] != expected:
            raise DataError(
                f"{path}: {count} bands of {kind}, and {first} has {expected[0]} of {expected[1]}; "
                "all images of a data set have the same: convert them, or prepare them apart"
            )
