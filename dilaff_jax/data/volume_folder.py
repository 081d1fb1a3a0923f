r"""volume_folder: your own volumes and label maps.

    python -m dilaff_jax.data.prepare --dataset volume_folder --name hippocampus \
        --source DIR --classes background,anterior,posterior --counts 120,30,50 --data_dir data

and then `config.dataset = "volume_folder/hippocampus"`. DIR is laid out as for image_folder:
images/ and labels/, with files of the same names, or train/images/ and so on; and so are the
classes. Of one folder --counts makes splits by a hash of the names.

Volumes are NIfTI (nibabel), TIFF stacks (tifffile; both: the extra `volumes`), or `.npy` and
`.npz` of one array `[D, H, W]` or `[D, H, W, C]`, of any size and numbers, with as many channels
in all files. A NIfTI is turned to its nearest canonical orientation; image and label map have to
lie in the same place. Spacing is read from it; that of other files is --spacing.

Values are kept as they are. How each volume is scaled is said in the config (`data.normalise`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dilaff_jax.data import band_folder, bands, builder, folders, volumes
from dilaff_jax.data.folders import Pair
from dilaff_jax.data.image_folder import option
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class VolumeOptions(band_folder.BandOptions):
    """What the builder can be told."""

    spacing: str = option("", "Size of a voxel along each axis, in mm: 0.5,0.5,2. NIfTI says it.")
    counts: str = option("", "Of one folder: how many for train, validation, test: 120,30,50.")


class Builder(band_folder.Builder):
    """The splits of image_folder; see the module's docstring."""

    name = "volume_folder"
    options_type: ClassVar[type[builder.Options]] = VolumeOptions
    options: VolumeOptions
    image_suffixes: ClassVar[Sequence[str]] = volumes.SUFFIXES
    mask_suffixes: ClassVar[Sequence[str]] = volumes.SUFFIXES
    ndim: ClassVar[int] = 3

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._spacing = _numbers(self.options.spacing, "--spacing", float)
        if self._spacing and (len(self._spacing) != 3 or min(self._spacing) <= 0):
            raise DataError(
                f"--spacing={self.options.spacing}: want three sizes above 0: 0.5,0.5,2"
            )
        self._spacings: list[tuple[float, ...]] = []

    def features(self) -> dict[str, Any]:
        """Volumes and label maps as bytes."""
        return super().features() | {"label": tfds.features.Text()}

    def read(self, item: Pair) -> builder.Example:
        """Reads one pair."""
        volume = volumes.load(item.image, self._spacing)
        label, place = volumes.load_label(item.label)
        volumes.check_same_place(item.image, volume.place, item.label, place)
        values, missing = volume.values, volume.missing
        # Of any numbers: each volume is scaled by itself, or all by their training split.
        self.check_like_first(item.image, values.shape[-1], np.dtype(np.float32))
        if missing is not None:
            self.check_nan(item.image, missing)  # of volumes nothing else says that there is none
            if missing.shape[:3] == label.shape:  # other shapes are refused later
                label = np.where(missing.all(axis=-1), IGNORE_LABEL, label)
        self.count(values, missing)
        self._spacings.append(volume.place.spacing)
        image, size = bands.encode(values, None), values.shape[:3]
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def record(self, example: builder.Example, classes: np.ndarray) -> dict[str, Any]:
        """The features of one example."""
        label = bands.packed(label=classes)
        return {"image": example.image, "label": label, "name": example.name}

    def measured(self, split: str) -> dict[str, Any]:
        """Also the spacing of each volume."""
        spacings, self._spacings = self._spacings, []
        return super().measured(split) | {"spacings": spacings}

    def counts(self, total: int) -> tuple[int, ...]:
        """How many of `total` volumes each split has; () where --validation_share says it."""
        return _numbers(self.options.counts, "--counts", int)

    def _divided(self, pairs: list[Pair]) -> Mapping[str, list[Pair]]:  # type: ignore[override]
        counts = self.counts(len(pairs))
        if not counts:
            return super()._divided(pairs)
        if len(counts) > len(_SPLITS) or min(counts) < 0 or sum(counts) != len(pairs):
            raise DataError(
                f"--counts={self.options.counts}: want up to three numbers, of train, validation "
                f"and test, that sum to the {len(pairs)} volumes there are"
            )
        shuffled = sorted(pairs, key=lambda pair: folders.name_hash(pair.name))
        ends = np.cumsum([0, *counts])
        splits = {
            name: sorted(shuffled[a:b], key=lambda pair: pair.name)
            for name, a, b in zip(_SPLITS, ends[:-1], ends[1:], strict=False)
        }
        return {name: items for name, items in splits.items() if items}

    @staticmethod
    def decode_label(data: bytes) -> np.ndarray:
        """The label map of a record, uint8 `[D, H, W]`."""
        return bands.unpacked(data)["label"]


def _numbers(text: str, flag: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise DataError(f"{flag}={text}: want numbers separated by commas") from error
