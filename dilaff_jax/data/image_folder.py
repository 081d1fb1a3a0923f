r"""image_folder: your own images and masks.

    python -m dilaff_jax.data.prepare --dataset image_folder --name pets \
        --source DIR --data_dir data

and then `config.dataset = "image_folder/pets"`. DIR holds

    classes.txt                            one class a line: line 1 is mask value 0, and so on
    train/images/*.jpg  train/labels/*.png
    val/images/*.jpg    val/labels/*.png   (val is stored as `validation`)

or only images/ and labels/, from which --validation_share are taken for validation (by a hash of
the name, so that adding images moves none). Other layouts: --images and --masks, with `{split}`
where the split's folder name stands. Is background a class? If it is in classes.txt. What Roboflow,
CVAT, labelme and Supervisely export is recognised and goes in as it comes, see `tool_exports`.

Masks: palette PNGs (their indices), grey images of 1 to 16 bits (their values). 255 is ignored.
A line `ignore` in classes.txt means that its value is ignored. 0/255 binary masks:
--mask_values=0:0,255:1. Masks in colours: --color_masks, with lines
`name R G B` in classes.txt, and `ignore R G B` for colours to be ignored.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dilaff_jax.data import builder, folders, images, tool_exports
from dilaff_jax.data.class_list import colormap
from dilaff_jax.data.folders import Pair
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

_IGNORE = "ignore"


def option(default: Any, text: str) -> Any:
    """A field of options: its default, and what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class FolderOptions(builder.Options):
    """What the builder can be told."""

    classes: str = option("classes.txt", "Class list: a file in --source, or NAME,NAME,...")
    images: str = option("{split}/images", "Where the images are, below --source.")
    masks: str = option("{split}/labels", "Where the masks are, below --source.")
    mask_suffix: str = option("", "What mask names have after the image's name, e.g. _mask.")
    color_masks: bool = option(False, "Masks are pictures in the colours of the class list.")
    other_colors: str = option("stop", "Colours not in the class list: 'stop' or 'ignore'.")
    validation_share: float = option(0.1, "Share taken for validation if there is one folder only.")


def read_classes(text: str) -> list[tuple[str, tuple[int, int, int] | None]]:
    """Parses a class list: lines `name` or `name R G B`; empty lines and `#` comments are skipped.

    Raises:
        DataError: no class, a class twice, or channels outside 0..255.
    """
    entries: list[tuple[str, tuple[int, int, int] | None]] = []
    for line in text.splitlines():
        words = line.split("#")[0].replace(",", " ").split()
        if len(words) > 3 and all(w.isdigit() for w in words[-3:]):
            red, green, blue = map(int, words[-3:])
            if max(red, green, blue) > 255:
                raise DataError(f"class list: {line!r}: channels must be in 0..255")
            entries.append((" ".join(words[:-3]), (red, green, blue)))
        elif words:
            entries.append((" ".join(words), None))
    names = [name for name, _ in entries if name != _IGNORE]
    if not names or len(set(names)) != len(names):
        raise DataError(f"class list: {names or 'empty'}: want one line for each class, each once")
    return entries


class Builder(builder.SegmentationBuilder):
    """Splits are the folders found; see the module's docstring."""

    name = "image_folder"
    options_type: ClassVar[type[builder.Options]] = FolderOptions
    options: FolderOptions
    image_suffixes: ClassVar[Sequence[str]] = folders.IMAGE_SUFFIXES
    mask_suffixes: ClassVar[Sequence[str]] = folders.IMAGE_SUFFIXES

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The options as given stay what the set is known by; the layout may be a tool's.
        self._layout = self.options
        self._export = self._recognised()
        entries = self._export.entries if self._export else self._class_list()
        self._folders: set[Any] = set()  # where `splits` looked for images and masks
        named = [(name, color) for name, color in entries if name != _IGNORE]
        uncolored = [name for name, color in entries if color is None]
        if self._layout.color_masks and uncolored:
            raise DataError(
                "--color_masks needs a colour for every class: lines `name R G B`; there is none "
                f"for {', '.join(uncolored)}"
            )
        self._names_of_values = [name for name, _ in entries]
        self.class_names = [name for name, _ in named]
        palette = colormap(len(named) + 1)[1:]  # not black, which an overlay hides
        self.colors = [color or palette[i] for i, (_, color) in enumerate(named)]
        self._values = {
            _code(color): self.class_names.index(name) if name != _IGNORE else IGNORE_LABEL
            for name, color in entries
            if color
        }

    def _recognised(self) -> tool_exports.Export | None:
        """The layout of an annotation tool, where nothing else is asked for."""
        asked = ("classes", "images", "masks", "mask_suffix", "color_masks")
        if any(getattr(self.options, name) != getattr(FolderOptions, name) for name in asked):
            return None
        if (self.source / self.options.classes).is_file():
            return None
        found = tool_exports.recognise(self.source)
        if found is not None:
            changes = {name: getattr(found, name) for name in asked if name != "classes"}
            self._layout = dataclasses.replace(self.options, **changes)
        return found

    @property
    def recognised(self) -> str | None:
        """The tool whose export the source is, if it is one."""
        return self._export and self._export.tool

    def _class_list(self) -> list[tuple[str, tuple[int, int, int] | None]]:
        given = self.options.classes
        file = self.source / given
        if file.is_file():
            try:
                text = folders.inside(self.source, file).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as e:
                raise DataError(f"{file}: the class list is not UTF-8 text: {e}") from e
            return read_classes(text)
        if "," not in given:
            coco = [*self.source.glob("*/_annotations.coco.json"), *self.source.glob("*.json")]
            coco += self.source.glob("annotations/*.json")
            hint = f". If {coco[0]} is COCO's JSON: --dataset coco_json" if coco else ""
            raise DataError(
                f"{file}: no class list; write one class a line in the order of the mask values "
                f"(line 1 is value 0), or give --classes NAME,NAME,...{hint}"
            )
        return read_classes(given.replace(",", "\n"))

    def label_map(self) -> Mapping[int, int]:
        """Line i of the class list is value i; where it says `ignore`, that value is ignored."""
        if self._layout.color_masks:
            return super().label_map()
        return {IGNORE_LABEL: IGNORE_LABEL} | {
            value: IGNORE_LABEL if name == _IGNORE else self.class_names.index(name)
            for value, name in enumerate(self._names_of_values)
        }

    def source_files(self) -> Sequence[pathlib.Path]:
        """Images, masks and the class list."""
        classes = self._export.classes if self._export else self.source / self.options.classes
        return [*((classes,) if classes.is_file() else ()), *super().source_files()]

    def unused_files(self) -> Sequence[pathlib.Path]:
        """Files beside images and masks that are no pair."""
        used = set(self.source_files())
        looked = sorted(self._folders)
        found = {f for folder in looked for f in folders.files_below(self.source, folder)}
        return sorted(found - used)

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """The folders that --images matches, or one folder divided by name."""
        pattern = self._layout.images
        if "{split}" not in pattern:
            return self._divided(self._pairs(pattern, self._layout.masks))
        names = sorted(
            folder.relative_to(self.source).parts[pattern.split("/").index("{split}")]
            for folder in self.source.glob(pattern.replace("{split}", "*"))
            if folder.is_dir() and not folders.hidden(folder.relative_to(self.source).parts[0])
        )
        if names:
            renamed = {"val": "validation", "valid": "validation"}
            return {
                renamed.get(name, name): self._pairs(
                    pattern.replace("{split}", name), self._layout.masks.replace("{split}", name)
                )
                for name in names
            }
        if (self.source / "images").is_dir():
            masks = "labels" if (self.source / "labels").is_dir() else "masks"
            return self._divided(self._pairs("images", masks))
        raise DataError(
            f"{self.source}: found neither {pattern} nor images/; state the layout with --images "
            "and --masks, e.g. --images '{split}/images' --masks '{split}/labels'"
        )

    def _pairs(self, image_dir: str, mask_dir: str) -> list[Pair]:
        choices = [mask_dir]
        if self._layout.masks == FolderOptions.masks and mask_dir.endswith("labels"):
            choices.append(mask_dir.removesuffix("labels") + "masks")
        where = folders.folder(self.source, image_dir), folders.folder(self.source, *choices)
        self._folders.update(where)
        return folders.pair_up(
            self.source,
            *where,
            label_suffix=self._layout.mask_suffix,
            suffixes=self.image_suffixes,
            label_suffixes=self.mask_suffixes,
        )

    def _divided(self, pairs: list[Pair]) -> dict[str, list[Pair]]:
        return split_by_name(pairs, self.options.validation_share)

    def read(self, item: Pair) -> builder.Example:
        """Reads one pair."""
        image, size = images.load_image(item.image, self.options.image_bits)
        label = self.read_mask(item)
        there = images.has_data(item.image)
        if there is not None and there.shape == label.shape:  # other shapes are refused later
            label = np.where(there, label, IGNORE_LABEL)
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def read_mask(self, item: Pair) -> np.ndarray:
        """The mask of a pair, raw values `[H, W]`."""
        other = IGNORE_LABEL if self.options.other_colors == "ignore" else None
        colors = self._values if self._layout.color_masks else None
        return images.load_label(item.label, colors, other)


def split_by_name(items: Sequence[Any], share: float) -> dict[str, list[Any]]:
    """A share of the items for validation, by a hash of their names; the rest for training.

    Raises:
        DataError: the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(f"--validation_share={share}: want 0 to below 1")
    held = {item.name for item in items if folders.name_hash(item.name) < share}
    if not held:
        return {"train": list(items)}
    return {
        "train": [item for item in items if item.name not in held],
        "validation": [item for item in items if item.name in held],
    }


def _code(color: tuple[int, int, int]) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]
