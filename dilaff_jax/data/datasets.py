"""Prepared data sets as random-access sources, found by name."""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

import dilaff_jax.data
from dilaff_jax.data import data_config, folders, images, location, volumes
from dilaff_jax.data.bands import Bands, Moments, with_bands
from dilaff_jax.data.bands import resized as resized_bands
from dilaff_jax.data.builder import SegmentationBuilder
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import machine

_COLOURS, _BYTES = 3, np.dtype(np.uint8)  # of an image without bands


def names() -> list[str]:
    """Names of the data sets: the modules of this package that define a class `Builder`."""
    folders = map(pathlib.Path, dilaff_jax.data.__path__)
    files = (file for folder in folders for file in folder.glob("*.py"))
    # By their text: importing every module for a list of names would be slow.
    return sorted(f.stem for f in files if "\nclass Builder(" in f.read_text(encoding="utf-8"))


def builder_class(name: str) -> type[SegmentationBuilder]:
    """The `Builder` of the module `dilaff_jax.data.NAME`.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"no data set {name!r}; available: {', '.join(names())}")
    return importlib.import_module(f"dilaff_jax.data.{name}").Builder


class _Index(NamedTuple):
    """What is known of a split without decoding it."""

    names: list[str]
    sizes: np.ndarray  # [N, 2]
    class_pixels: np.ndarray | None  # [C]
    spacings: np.ndarray | None = None  # [N, 3], of volumes


@dataclasses.dataclass
class Source:
    """A prepared split as a sequence of examples; picklable, reads on demand.

    `source[i]` is `{"image": uint8 [H, W, 3] RGB, "label": uint8 [H, W]}`, 255 = ignored; of a data
    set of bands the image is `[H, W, C]` of `dtype`.

    Attributes:
        title: Data set and split, for messages.
        class_names: Names of the classes, `num_classes` of them.
        colors: uint8 [num_classes, 3], RGB.
        names: Name of each example.
        sizes: int [N, 2], height and width of each example, after `resize`; of volumes [N, 3].
        class_pixels: int64 [num_classes], labelled pixels of each class in the whole split, before
            `resize`; None where the data set was prepared by tfds itself.
        bands: means and deviations of the images' bands; None where they are RGB of 8 bits.
        dtype: of the images' numbers.
        spacings: of volumes, [N, 3], size of a voxel along each axis in millimetres; else None.
        normalise: of volumes, see `volumes.normalised`.
    """

    title: str
    class_names: tuple[str, ...]
    colors: np.ndarray
    names: list[str]
    sizes: np.ndarray
    class_pixels: np.ndarray | None
    records: Any
    indices: np.ndarray
    builder: type[SegmentationBuilder]
    resize: float = 1.0
    cache: bool = False
    bands: Bands | None = None
    dtype: np.dtype = _BYTES
    spacings: np.ndarray | None = None
    normalise: volumes.Normalisation = "none"
    _cached: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignored label not counted."""
        return len(self.class_names)

    @property
    def ndim(self) -> int:
        """Spatial dimensions."""
        return self.builder.ndim

    @property
    def channels(self) -> int:
        """Number of an image's channels, C."""
        return _COLOURS if self.bands is None else self.bands.count

    def picture(self, image: np.ndarray) -> np.ndarray:
        """An image of the split for people to look at, RGB uint8 `[H, W, 3]`; see `slice_of`."""
        flat = self.slice_of(image)
        return flat if self.bands is None else self.bands.picture(flat)

    def slice_of(self, x: np.ndarray) -> np.ndarray:
        """A map of an image as it is; of a volume its middle slice, see `volumes.middle`."""
        return x if self.ndim == 2 else volumes.middle(x)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index in self._cached:
            return self._cached[index]
        try:
            example = self._decode(self.records[int(self.indices[index])])
        except DataError as e:
            raise DataError(f"{self.title}, example {self.names[index]!r}: {e}") from e
        if self.cache:
            self._cached[index] = example
        return example

    def _decode(self, record: dict[str, bytes]) -> dict[str, np.ndarray]:
        image = self.builder.decode_image(record[self.builder.image_key], self.bands)
        label = self.builder.decode_label(record[self.builder.label_key])
        if image.shape[:-1] != label.shape:
            raise DataError(f"image {image.shape[:-1]} and label {label.shape} differ in size")
        if self.builder.ndim == 3:
            image = volumes.normalised(image, self.normalise)
        if self.builder.read_lut is not None:
            label = self.builder.read_lut[label]
        if self.resize != 1:
            height, width = resized(np.array(label.shape), self.resize)
            image = resized_bands(image, (height, width), cv2.INTER_AREA)
            label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return {"image": image, "label": label}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": {}}  # a worker process decodes for itself


def resized(sizes: np.ndarray, factor: float) -> np.ndarray:
    """Heights and widths after `resize`, rounded, at least 1."""
    return np.maximum(1, np.floor(sizes * factor + 0.5)).astype(int)


def load(config: Any, split: str) -> Source:
    """Opens a split of a prepared data set.

    Args:
        config: `config.data`, see `data.config.default`.
        split: A split's name, several joined by `+`, or "held_out". `config.hold_out` takes
            examples out of `config.train_split` only, and `config.train_images` leaves so many.

    Returns:
        The split as a Source, in the order of names.

    Raises:
        UserError: wrong config, unknown data set or split, not prepared, nothing left after
            `hold_out`, or more pictures than fit in memory with `cache`.
    """
    data_config.check(config)
    builder = builder_class(config.dataset.partition("/")[0])
    stored = _open(config, builder)
    held_out = split == "held_out"
    title = f"{config.dataset} {split}"
    index, records = _read_split(stored, builder, config.train_split if held_out else split, title)
    keep = np.arange(len(index.names))
    if held_out or (split == config.train_split and config.hold_out):
        out = np.array([name.startswith(tuple(config.hold_out)) for name in index.names])
        keep = np.flatnonzero(out if held_out else ~out)
        _check_hold_out(config, index.names, keep, split)
    if split == config.train_split and config.train_images:
        keep = _fewer(config.train_images, index.names, keep, title)
    class_names, colors = _classes(stored, builder)
    bands, dtype = _bands(stored, builder, config)
    if builder.ndim == 3 and config.resize != 1:
        raise UserError(
            f"config.data.resize is {config.resize}, and {config.dataset} holds volumes, which are "
            "read as they are; leave it at 1.0, or resample the files"
        )
    source = Source(
        title=title,
        class_names=class_names,
        colors=colors,
        names=[index.names[i] for i in keep],
        sizes=resized(index.sizes[keep], config.resize)
        if config.resize != 1
        else index.sizes[keep],
        class_pixels=index.class_pixels,
        records=records,
        indices=keep,
        builder=builder,
        resize=config.resize,
        cache=config.cache,
        bands=bands,
        dtype=dtype,
        spacings=None if index.spacings is None else index.spacings[keep],
        normalise=config.normalise,
    )
    _check_cache(source, config)
    return source


def _open(config: Any, builder: type[SegmentationBuilder]) -> Any:
    """The stored data set as a tfds builder."""
    where = location.directory(builder, config.dataset, config.data_dir)
    if where is None or not (where / "dataset_info.json").is_file():
        name, _, config_name = config.dataset.partition("/")
        wanted = where or location.home(builder, config.dataset, config.data_dir)
        near = where.parent.parent.rglob("dataset_info.json") if where else ()
        others = sorted(str(p.parent) for p in near)
        options = f" --name {config_name}" if config_name and not builder.config_name else ""
        raise UserError(
            f"data set {config.dataset!r} is not prepared in {wanted}"
            + (f" (found: {', '.join(others[:5])})" if others else "")
            + f"; run: python -m dilaff_jax.data.prepare --dataset {name}{options}"
            + (" --source DIR" if builder.needs_source else "")
            + f" --data_dir {config.data_dir}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # tfds reports every folder that it opens
    try:
        return tfds.builder_from_directory(os.fspath(where))
    finally:
        logging.set_verbosity(verbosity)


def _read_split(
    stored: Any, builder: type[SegmentationBuilder], split: str, title: str
) -> tuple[_Index, Any]:
    """What is known of `a+b`, and its records as tfds's data source."""
    parts = [builder.stored_splits.get(part, part) for part in split.split("+")]
    available = [s for s in stored.info.splits if stored.info.splits[s].num_examples]
    for part in parts:
        if part not in available:
            shown = {stored_name: own for own, stored_name in builder.stored_splits.items()}
            raise UserError(
                f"{title}: no split {part!r}; available: "
                f"{', '.join(shown.get(s, s) for s in available)}, several joined by +, or "
                "'held_out' (the examples that hold_out takes from train_split)"
            )
    if len(set(parts)) != len(parts):
        raise UserError(f"{title}: a split is named twice")
    skip = {key: tfds.decode.SkipDecoding() for key in (builder.image_key, builder.label_key)}
    try:
        records = stored.as_data_source("+".join(parts), decoders=skip)
    except NotImplementedError as e:
        raise UserError(
            f"{stored.data_dir}: stored as {stored.info.file_format}; this project reads "
            "file_format='array_record': prepare it again"
        ) from e
    return _index(stored, builder, parts, records, title), records


def _index(
    stored: Any, builder: type[SegmentationBuilder], parts: Sequence[str], records: Any, title: str
) -> _Index:
    own = {stored_name: name for name, stored_name in builder.stored_splits.items()}
    described = (stored.info.metadata or {}).get("splits", {})
    if not all(own.get(part, part) in described for part in parts):
        return _scan(builder, records, title)
    parts_described = [described[own.get(part, part)] for part in parts]
    return _Index(
        names=[name for split in parts_described for name in split["names"]],
        sizes=np.concatenate([np.array(split["sizes"]) for split in parts_described]),
        class_pixels=np.sum([split["class_pixels"] for split in parts_described], axis=0),
        spacings=np.concatenate([np.array(split["spacings"]) for split in parts_described])
        if builder.ndim == 3
        else None,
    )


def _scan(builder: type[SegmentationBuilder], records: Any, title: str) -> _Index:
    """Names and sizes of a data set that tfds itself prepared, from the headers of its images."""
    names, sizes = [], []
    for number, record in enumerate(tqdm(records, desc=f"{title}: sizes", unit="image")):
        name = record[builder.name_key].decode() if builder.name_key else f"{number:06d}"
        names.append(name)
        sizes.append(images.encoded_size(record[builder.image_key]))
    return _Index(names, np.array(sizes), None)


def _classes(stored: Any, builder: type[SegmentationBuilder]) -> tuple[tuple[str, ...], np.ndarray]:
    described = stored.info.metadata or {}
    class_names = described.get("class_names", builder.class_names)
    colors = described.get("colors", builder.colors)
    return tuple(class_names), np.array(colors, np.uint8)


def _bands(
    stored: Any, builder: type[SegmentationBuilder], config: Any
) -> tuple[Bands | None, np.dtype]:
    """What is known of the bands, and the type of their numbers; None for RGB of 8 bits."""
    if not builder.has_bands:
        if config.bands:
            raise UserError(
                f"config.data.bands is {config.bands}, and {config.dataset} holds RGB images of 8 "
                "bits; leave it at 0"
            )
        return None, _BYTES
    described = stored.info.metadata["splits"]
    trained = [described[s] for s in config.train_split.split("+") if s in described]
    measured = [split["bands"] for split in trained or described.values()]
    together = Moments.joined(measured)
    dtype = np.dtype(np.float32 if builder.ndim == 3 else measured[0]["dtype"])
    if builder.ndim == 3 and config.normalise != "none":  # each by itself, as it is read
        count = len(together["mean"])
        together = {"mean": [0.0] * count, "std": [1.0] * count}
    # A band that is the same everywhere says nothing, however it is scaled.
    std = [s or 1.0 for s in together["std"]]
    bands = Bands.of(together["mean"], std, config.shown_bands)
    if config.bands not in (0, bands.count):
        raise UserError(
            f"config.data.bands is {config.bands}, and the images of {config.dataset} have "
            f"{bands.count}; leave it at 0, or prepare the data set anew"
        )
    return bands, dtype


def completed(config: Any) -> Any:
    """The whole config with what its data set says of its images.

    Of a data set of bands: their number (`data.bands`), and their means and deviations, as options
    of the encoder where it is given none; of volumes `model.ndim`, too. Any other config is
    returned as it is.

    Raises:
        UserError: as `load`.
    """
    data = config.data
    builder = builder_class(data.dataset.partition("/")[0])
    if not builder.has_bands:
        return config
    data_config.check(data)
    bands, _ = _bands(_open(data, builder), builder, data)
    return config if bands is None else with_bands(config, bands.mean, bands.std, builder.ndim)


def _fewer(count: int, names: Sequence[str], keep: np.ndarray, title: str) -> np.ndarray:
    """The `count` of `keep` that come first by a hash of their names, in the order of `keep`."""
    if count > len(keep):
        raise UserError(
            f"config.data.train_images is {count}, and {title} has {len(keep)} to train on; give "
            "as many or fewer, or 0 for all"
        )
    first = sorted(keep, key=lambda i: folders.name_hash(names[i]))[:count]
    return np.sort(np.array(first, int))


def _check_hold_out(config: Any, names: Sequence[str], keep: np.ndarray, split: str) -> None:
    unused = [p for p in config.hold_out if not any(name.startswith(p) for name in names)]
    if unused or not len(keep):
        first = ", ".join(sorted({name.split("_")[0] for name in names})[:8])
        raise UserError(
            f"config.data.hold_out={tuple(config.hold_out)} leaves {len(keep)} examples for "
            f"{split!r}" + (f", and no name starts with {unused}" if unused else "") + "; names in "
            f"{config.train_split!r} start with {first}"
        )


def _check_cache(source: Source, config: Any) -> None:
    pixel = source.channels * source.dtype.itemsize + 1
    needed = pixel * int(source.sizes.prod(axis=1).sum()) * max(1, config.workers)
    if source.cache and needed > 0.7 * machine.memory():
        raise UserError(
            f"config.data.cache=True needs {needed / 2**30:.1f} GiB for {source.title} with "
            f"workers={config.workers}, this machine has {machine.memory() / 2**30:.1f} GiB; turn "
            "it off, lower workers or lower resize"
        )
