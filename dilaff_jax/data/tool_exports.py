"""Layouts in which annotation tools export segmentations, recognised by the files they leave.

Roboflow, "Semantic Segmentation Masks": SPLIT/NAME.jpg, SPLIT/NAME_mask.png, SPLIT/_classes.csv.
CVAT, "Segmentation mask 1.1" with images: JPEGImages, SegmentationClass in colours, labelmap.txt.
labelme, `labelme2voc.py`: JPEGImages, SegmentationClassPNG or SegmentationClass, class_names.txt.
Supervisely, "Export as masks": SPLIT/img, SPLIT/masks_machine, obj_class_to_machine_color.json.
"""

import csv
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from dilaff_jax.data import folders
from dilaff_jax.data.images import DataError

Color: TypeAlias = tuple[int, int, int]
Entry: TypeAlias = tuple[str, Color | None]

# What the pixels are called that no object of Supervisely's covers.
_BACKGROUND = "background"


class Export(NamedTuple):
    """A layout that was recognised.

    Attributes:
        tool: whose it is, for a person.
        images: where images are, with {split} for the folder of a split.
        masks: where masks are.
        mask_suffix: what mask names have after the image's.
        color_masks: whether masks are in the classes' colours.
        entries: (name, colour) of each class, in the order of their values.
        classes: the file that says so.
    """

    tool: str
    images: str
    masks: str
    mask_suffix: str
    color_masks: bool
    entries: list[Entry]
    classes: pathlib.Path


def recognise(source: pathlib.Path) -> Export | None:
    """The layout of a folder, if a tool's.

    Raises:
        DataError: the tool's list of classes cannot be read.
    """
    lists = sorted(source.glob("*/_classes.csv"))
    if lists:
        tables = {file: _numbered(_csv(file), file) for file in lists}
        first = tables[lists[0]]
        for file, entries in tables.items():
            if entries != first:
                raise DataError(f"{file}: other classes than {lists[0]}; export them together")
        return Export("Roboflow", "{split}", "{split}", "_mask", False, first, lists[0])
    file = source / "labelmap.txt"
    if file.is_file() and (source / "SegmentationClass").is_dir():
        entries = _labelmap(file)
        return Export("CVAT", "JPEGImages", "SegmentationClass", "", True, entries, file)
    file = source / "class_names.txt"
    if file.is_file() and (source / "JPEGImages").is_dir():
        names = [line.strip() for line in _text(file).splitlines() if line.strip()]
        masks = "SegmentationClassPNG"
        masks = masks if (source / masks).is_dir() else "SegmentationClass"
        entries = [(name.strip("_"), None) for name in names if name != "__ignore__"]
        return Export("labelme", "JPEGImages", masks, "", False, entries, file)
    file = source / "obj_class_to_machine_color.json"
    if file.is_file():
        entries = _numbered(_machine_colors(file), file)
        return Export("Supervisely", *_parts(source), "", False, entries, file)
    return None


def _parts(source: pathlib.Path) -> tuple[str, str]:
    """Where Supervisely's images and masks are; a project of one data set has no splits."""
    found = sorted(p.parent.relative_to(source).as_posix() for p in source.glob("*/masks_machine"))
    split = found[0] if len(found) == 1 else "{split}"
    return f"{split}/img", f"{split}/masks_machine"


def _numbered(values: Mapping[int, str], file: pathlib.Path) -> list[Entry]:
    """Names in the order of values 0, 1, 2, ..."""
    if sorted(values) != list(range(len(values))):
        raise DataError(
            f"{file}: the mask values are {sorted(values)}; expected 0 to {len(values) - 1}: write "
            "classes.txt by hand (line 1 is value 0), and give --classes=classes.txt with --images "
            "and --masks"
        )
    return [(values[value], None) for value in range(len(values))]


def _csv(file: pathlib.Path) -> dict[int, str]:
    """Lines `Pixel Value, Class`."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(_text(file).splitlines())]
        return {int(row[0]): row[1] for row in rows[1:] if row}
    except (ValueError, IndexError) as error:
        raise DataError(f"{file}: expected lines `VALUE, NAME` below a title: {error}") from error


def _labelmap(file: pathlib.Path) -> list[Entry]:
    """Lines `name:r,g,b:parts:actions`."""
    entries: list[Entry] = []
    for line in _text(file).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(c) for c in rest.split(":")[0].split(","))
        except ValueError as error:
            raise DataError(f"{file}: {line!r}: expected name:r,g,b::") from error
        entries.append((name.strip(), (red, green, blue)))
    return entries


def _machine_colors(file: pathlib.Path) -> dict[int, str]:
    """{"name": [v, v, v]}: value v, 0 being no object."""
    try:
        content = json.loads(_text(file))
        values = {int(color[0]): str(name) for name, color in content.items()}
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise DataError(f"{file}: expected {{NAME: [VALUE, VALUE, VALUE]}}: {error}") from error
    if len(values) != len(content):
        raise DataError(f"{file}: two classes have one value")
    return {0: _BACKGROUND} | values


def _text(file: pathlib.Path) -> str:
    try:
        return folders.inside(file.parent, file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: the class list is not UTF-8 text: {error}") from error
