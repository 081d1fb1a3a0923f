"""What every data set shares: the tfds builder that checks each example and writes ArrayRecord.

A data set is one module with a class `Builder(SegmentationBuilder)`:

    class Builder(SegmentationBuilder):
        name = "my_set"
        class_names = ("background", "cat")
        colors = ((0, 0, 0), (64, 0, 0))

        def splits(self):             # what there is: {"train": [...], "validation": [...]}
            return {"train": folders.pair_up(self.source, ...), ...}

`prepare` and `datasets.load` find it by the module's name. Override `read` where an example is not
a pair of files, and `label_map` where raw values are not class indices.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dilaff_jax.data import folders, images
from dilaff_jax.data.bands import Bands
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

SPLITS = ("train", "validation", "test")  # the customary names
_OUTSIDE = 256  # in lookup tables: a raw value that is no class and not ignored


_Base: Any = tfds.core.GeneratorBasedBuilder
_BaseInfo: Any = tfds.core.DatasetInfo


class _Info(_BaseInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: tfds would ask its bucket on the net, and leave a temporary folder."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `prepare` that every data set has; a data set adds its own by subclassing."""

    mask_values: str = dataclasses.field(
        default="",
        metadata={
            "help": "FOUND:MEANT,...: values in the mask files and what they mean in the data "
            "set's own numbering (255 = ignore), such as 0:0,255:1 for 0/255 binary masks."
        },
    )
    image_bits: int = dataclasses.field(
        default=0,
        metadata={
            "help": "How many bits count in images with more than 8 a channel, 9 to 16: 12 for a "
            "camera of 12 bits. 0: those that the file has."
        },
    )


@dataclasses.dataclass
class Example:
    """One example as read: encoded image, its size, raw label values; the files for messages."""

    name: str
    image: bytes
    size: tuple[int, int]
    label: np.ndarray
    image_file: Any = ""
    label_file: Any = ""


def lookup_table(values: Mapping[int, int]) -> np.ndarray:
    """Table [256] from stored values to class indices; values that are not listed are ignored."""
    table = np.full(256, IGNORE_LABEL, np.uint8)
    for stored, index in values.items():
        table[stored] = index
    return table


def parse_mask_values(text: str) -> dict[int, int]:
    """Parses `FOUND:MEANT,...`. Raises DataError if it is something else."""
    try:
        pairs = [entry.split(":") for entry in text.split(",") if entry.strip()]
        values = {int(value): int(meant) for value, meant in pairs}
    except ValueError as e:
        raise DataError(f"--mask_values={text}: want FOUND:MEANT,..., such as 0:0,255:1") from e
    if any(not -(2**31) <= v < 2**31 for v in values):
        raise DataError(f"--mask_values={text}: values are whole numbers of 32 bits")
    return values


class SegmentationBuilder(_Base):
    """Base of all data sets; see the module's docstring.

    Attributes:
        class_names: Names of the classes, in the order of their indices.
        colors: RGB of each class, for pictures.
        options_type: Dataclass of what `prepare` can be told.
        image_key, label_key, name_key: Names of the features in the records.
        stored_splits: {split: its name in the records} where they differ.
        read_lut: Table [256] from stored label values to class indices, if they differ.
        config_name: Name of the builder config if the data set has a fixed one.
        needs_source: Whether `prepare` must be given a folder of files.
        lists_sources: Whether `splits` only looks for files, and unpacks nothing.
        has_bands: Whether images are of any bands instead of RGB of 8 bits.
        ndim: Spatial dimensions, 2 of images, 3 of volumes.
    """

    VERSION = tfds.core.Version("1.0.0")
    name: ClassVar[str]
    class_names: Sequence[str] = ()
    colors: Sequence[Sequence[int]] = ()
    options_type: ClassVar[type[Options]] = Options
    image_key: ClassVar[str] = "image"
    label_key: ClassVar[str] = "label"
    name_key: ClassVar[str] = "name"
    stored_splits: ClassVar[Mapping[str, str]] = {}
    read_lut: ClassVar[np.ndarray | None] = None
    config_name: ClassVar[str | None] = None
    needs_source: ClassVar[bool] = True
    lists_sources: ClassVar[bool] = True
    has_bands: ClassVar[bool] = False
    ndim: ClassVar[int] = 2
    # tfds looks for checksums of downloads beside the module, by a package it does not require.
    url_infos: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Found by module name; tfds's own registry would refuse a second `cityscapes`.
        super().__init_subclass__(skip_registration=True, **kwargs)

    def __init__(
        self,
        *,
        data_dir: str,
        config_name: str | None = None,
        options: Options | None = None,
        source: pathlib.Path | None = None,
        scratch: pathlib.Path | None = None,
    ) -> None:
        self.options = options or self.options_type()
        if self.options.image_bits and not 9 <= self.options.image_bits <= 16:
            raise DataError(f"--image_bits={self.options.image_bits}: want 9 to 16, or 0")
        self.source = source or pathlib.Path()
        self.scratch = scratch or pathlib.Path(data_dir)
        self._read: set[pathlib.Path] = set()  # of the source; archives where they were unpacked
        config = config_name and tfds.core.BuilderConfig(name=config_name, version=self.VERSION)
        super().__init__(data_dir=data_dir, config=config or None, file_format="array_record")

    # What a data set defines.

    def splits(self) -> Mapping[str, Sequence[Any]]:
        """{split: its examples, in the order they are stored}."""
        raise NotImplementedError

    def read(self, item: Any) -> Example:
        """Reads one item of `splits` (a `folders.Pair` unless overridden)."""
        image, size = images.load_image(item.image, self.options.image_bits)
        label = images.load_label(item.label)
        return Example(item.name, image, size, label, item.image, item.label)

    def label_map(self) -> Mapping[int, int]:
        """{raw value: class index or 255}; by default the classes themselves and 255."""
        return {IGNORE_LABEL: IGNORE_LABEL} | {i: i for i in range(len(self.class_names))}

    def features(self) -> dict[str, Any]:
        """The tfds features of a record."""
        return {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(
                shape=(None, None, 1), encoding_format="png", use_colormap=True
            ),
            "name": tfds.features.Text(),
        }

    def record(self, example: Example, classes: np.ndarray) -> dict[str, Any]:
        """The features of one example; `classes` is its checked label map of class indices."""
        label = images.encode_png(classes)
        return {"image": example.image, "label": label, "name": example.name}

    def measured(self, split: str) -> dict[str, Any]:
        """What else is to be known of a split, all of whose examples were read."""
        return {}

    @staticmethod
    def decode_image(data: bytes, bands: Bands | None) -> np.ndarray:
        """The image of a record, `[H, W, C]`; of those of `has_bands` `bands` says more."""
        return images.decode_image(data)

    @staticmethod
    def decode_label(data: bytes) -> np.ndarray:
        """The label map of a record, uint8 `[*spatial]`."""
        return images.decode_label(data)

    def source_files(self) -> Sequence[pathlib.Path]:
        """The files of `source` on which the records depend.

        Where `splits` unpacks archives they are known only after it has: those that were read.
        """
        if not self.lists_sources:
            return sorted(self._read)
        pairs = [
            p for items in self.splits().values() for p in items if isinstance(p, folders.Pair)
        ]
        return sorted({file for pair in pairs for file in (pair.image, pair.label)})

    def unpacked(self, wanted: str, archives: Sequence[str]) -> pathlib.Path:
        """The folder `wanted` of the source, or of its archives, see `folders.unpacked`."""
        root = folders.unpacked(self.source, self.scratch, wanted, archives)
        if root != self.source / wanted:
            self._read.update(self.source / name for name in archives)
        return root

    @property
    def recognised(self) -> str | None:
        """The tool whose export the source was found to be."""
        return None

    def unused_files(self) -> Sequence[pathlib.Path]:
        """Files that lie where images and masks are expected, and that nothing is made of."""
        return ()

    # What tfds calls.

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            features=tfds.features.FeaturesDict(self.features()),
            # Stored in the order of names, so that index i of a split is a fact one can look up.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        splits = self.splits()
        empty = [split for split, items in splits.items() if not len(items)]
        if empty or not splits:
            raise DataError(f"{self.source}: no examples for the split {', '.join(empty) or 'any'}")
        self.info.metadata.update(
            class_names=list(self.class_names),
            colors=[list(map(int, color)) for color in self.colors],
            options=dataclasses.asdict(self.options),
            unused=[p.relative_to(self.source).as_posix() for p in self.unused_files()],
            splits={},
        )
        return {
            self.stored_splits.get(split, split): self._generate_examples(split, items)
            for split, items in splits.items()
        }

    def _generate_examples(
        self, split: str, items: Sequence[Any]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        count = len(self.class_names)
        names: list[str] = []
        sizes: list[tuple[int, int]] = []
        raw_seen = np.zeros(65536, bool)
        pixels, containing = np.zeros(256, np.int64), np.zeros(256, np.int64)
        table = self._table()
        for index, item in enumerate(tqdm(items, desc=f"{self.name} {split}", unit="image")):
            example = self.read(item)
            classes = self._check(example, table, raw_seen)
            counts = np.bincount(classes.ravel(), minlength=256)
            pixels, containing = pixels + counts, containing + (counts > 0)
            files = {pathlib.Path(f) for f in (example.image_file, example.label_file) if f}
            self._read |= {
                f
                for f in files
                if f.is_relative_to(self.source) and not f.is_relative_to(self.scratch)
            }
            names.append(example.name)
            sizes.append(example.size)
            yield index, self.record(example, classes)
        self._check_split(split, names, raw_seen)
        self.info.metadata["splits"][split] = {
            "names": names,
            "sizes": [list(map(int, size)) for size in sizes],
            "class_pixels": pixels[:count].tolist(),
            "class_images": containing[:count].tolist(),
            "ignored_pixels": int(pixels[IGNORE_LABEL]),
            **self.measured(split),
        }

    # Checks.

    def _table(self) -> np.ndarray:
        """Lookup table [65536]: raw value → class index, 255 = ignore, 256 = neither."""
        if not 1 <= len(self.class_names) <= IGNORE_LABEL:
            raise DataError(f"{len(self.class_names)} classes: want 1 to 255")
        table = np.full(65536, _OUTSIDE, np.uint16)
        own = dict(self.label_map())
        for raw, index in own.items():
            table[raw] = index
        for value, meant in parse_mask_values(self.options.mask_values).items():
            if meant not in own:
                raise DataError(
                    f"--mask_values {value}:{meant}: {meant} is no value of this data set; "
                    f"allowed are {_ranges(own)}"
                )
            if 0 <= value < 65536:
                table[value] = own[meant]
        return table

    def _beyond_table(self) -> dict[int, int]:
        """What --mask_values maps of values that no table holds: negative ones, more than 16 bits.

        Such as -1 and -100 for "ignore".
        """
        own = self.label_map()
        meant = parse_mask_values(self.options.mask_values)
        return {value: own[m] for value, m in meant.items() if not 0 <= value < 65536}

    def _check(self, example: Example, table: np.ndarray, raw_seen: np.ndarray) -> np.ndarray:
        """Maps raw label values to class indices, uint8 `[H, W]`; DataError if any cannot be."""
        if example.label.shape != tuple(example.size):
            raise DataError(
                f"{example.label_file}: the mask is {_hxw(example.label.shape)}, its image "
                f"{example.image_file} is {_hxw(example.size)} ({self._axes()}); save both in the "
                "same size and orientation"
            )
        raw = example.label
        within = (raw >= 0) & (raw < 65536)
        classes = np.where(within, table[np.where(within, raw, 0)], _OUTSIDE)
        for value, index in self._beyond_table().items() if not within.all() else ():
            classes[raw == value] = index
        if (classes == _OUTSIDE).any():
            raise DataError(self._outside_message(example, raw[classes == _OUTSIDE]))
        raw_seen[raw[within]] = True
        return classes.astype(np.uint8)

    def _outside_message(self, example: Example, values: np.ndarray) -> str:
        distinct, counts = np.unique(values, return_counts=True)
        largest = np.argsort(-counts)[:5]
        if distinct[0] >= images.UNKNOWN_COLOR:
            listed = ", ".join(
                f"colour #{int(distinct[i]) - images.UNKNOWN_COLOR:06x} ({counts[i]} pixels)"
                for i in largest
            )
            return (
                f"{example.label_file}: {listed}: no colour of the class list; add it there, or "
                "drop such pixels with --other_colors ignore"
            )
        listed = ", ".join(f"value {distinct[i]} ({counts[i]} pixels)" for i in largest)
        more = f" and {len(distinct) - 5} more values" if len(distinct) > 5 else ""
        return (
            f"{example.label_file}: {listed}{more} outside the classes: allowed are "
            f"{_ranges(self.label_map())} ({len(self.class_names)} classes: "
            f"{', '.join(self.class_names[:8])}{', ...' if len(self.class_names) > 8 else ''}); "
            f"map it with --mask_values {distinct[largest[0]]}:CLASS, or "
            f"{distinct[largest[0]]}:{self._ignored_value()} to ignore it"
        )

    def _axes(self) -> str:
        return "height x width, after any EXIF rotation" if self.ndim == 2 else "voxels"

    def _ignored_value(self) -> int:
        """A raw value that this data set ignores."""
        return next((r for r, c in self.label_map().items() if c == IGNORE_LABEL), IGNORE_LABEL)

    def _check_split(self, split: str, names: list[str], raw_seen: np.ndarray) -> None:
        """Catches the 0/255 trap: binary masks whose foreground would silently be ignored."""
        values = np.flatnonzero(raw_seen).tolist()
        if values == [0, 255] and "255:" not in self.options.mask_values.replace(" ", ""):
            raise DataError(
                f"{self.source}: all {len(names)} masks of {split!r} hold only the values 0 and "
                "255, and 255 means 'ignore': say what is meant, --mask_values 0:0,255:1 for "
                "binary masks, or --mask_values 255:255 if 255 really is to be ignored"
            )
        if len(set(names)) != len(names):
            raise DataError(f"{self.source}: two examples of {split!r} have one name")


def _ranges(values: Mapping[int, int]) -> str:
    """`0..10, 255` for the keys of a label map."""
    keys = sorted(values)
    starts = [k for k in keys if k - 1 not in values]
    ends = [k for k in keys if k + 1 not in values]
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))


def _hxw(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
