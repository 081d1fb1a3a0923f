r"""coco_json: annotations in COCO's JSON formats, instances (or stuff) and panoptic.

    pip install -e '.[coco]'
    python -m dilaff_jax.data.prepare --dataset coco_json --name street --source DIR --data_dir data

and then `config.dataset = "coco_json/street"`. Found below --source, without being told:

    annotations/instances_SPLIT.json, stuff_SPLIT.json      COCO's own layout, CVAT "COCO 1.0"
    annotations/panoptic_SPLIT.json with a folder of PNGs   COCO panoptic
    SPLIT/_annotations.coco.json                            Roboflow, COCO Segmentation
    result.json or another single .json                     Label Studio, Supervisely, own tools

Images are looked for where the JSON lies, below images/SPLIT, SPLIT and images/. `train2017` is
stored as `train`, `val`, `valid` and `val2017` as `validation`; of one split only,
--validation_share is taken for validation.

Classes are the categories in the order of their ids. What no object covers is the class
`background`, which comes first, or with --uncovered ignore is ignored; in panoptic annotations it
is always ignored. Where objects overlap the smaller one lies on top. Regions of crowds (`iscrowd`)
are ignored.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dilaff_jax.data import builder, folders, images, outlines
from dilaff_jax.data.class_list import colormap
from dilaff_jax.data.image_folder import option, split_by_name
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

BACKGROUND = "background"
_SPLITS = {
    "train2017": "train",
    "default": "train",
    **dict.fromkeys(("val", "valid", "val2017"), "validation"),
}
_KINDS = ("instances", "stuff", "panoptic")
_ROBOFLOW = "_annotations.coco.json"


@dataclasses.dataclass(frozen=True)
class CocoOptions(builder.Options):
    """What the builder can be told."""

    annotations: str = option("", "The JSON file below --source; {split} where its split stands.")
    categories: str = option(
        "", "NAME,NAME,...: the categories that are classes; others are left out."
    )
    uncovered: str = option(BACKGROUND, "What no object covers: 'background' or 'ignore'.")
    outside: str = option("stop", "Polygons that leave their image: 'stop' or 'cut'.")
    validation_share: float = option(0.1, "Share taken for validation if there is one split only.")


class Item(NamedTuple):
    """An image and what the JSON says of it; `label` is the JSON, or of panoptic its PNG."""

    name: str
    image: pathlib.Path
    label: pathlib.Path
    size: tuple[int, int]
    annotations: Sequence[Mapping[str, Any]]
    panoptic: bool


class _File(NamedTuple):
    """A JSON file, checked."""

    path: pathlib.Path
    split: str
    content: Mapping[str, Any]
    panoptic: bool


class Builder(builder.SegmentationBuilder):
    """Splits are the JSON files found; see the module's docstring."""

    name = "coco_json"
    options_type = CocoOptions
    options: CocoOptions

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outlines.check_choice("uncovered", self.options.uncovered, (BACKGROUND, "ignore"))
        outlines.check_choice("outside", self.options.outside, ("stop", "cut"))
        # A set that is only read back has no source.
        self._files = self._find() if kwargs.get("source") else []
        kinds = {file.panoptic for file in self._files}
        if len(kinds) > 1:
            raise DataError(
                f"{self.source}: both instances and panoptic annotations; say which are meant, "
                "such as --annotations 'annotations/panoptic_{split}.json'"
            )
        self._background = kinds != {True} and self.options.uncovered == BACKGROUND
        self._values = self._categories()
        palette = colormap(len(self.class_names) + 1)
        self.colors = palette[:-1] if self._background else palette[1:]

    def _find(self) -> list[_File]:
        pattern = self.options.annotations
        if pattern:
            paths = sorted(self.source.glob(pattern.replace("{split}", "*")))
        else:
            paths = sorted(self.source.glob(f"*/{_ROBOFLOW}"))
            paths = paths or sorted(
                path
                for kind in _KINDS
                for folder in (self.source / "annotations", self.source)
                for path in folder.glob(f"{kind}_*.json")
            )
            paths = paths or sorted(self.source.glob("*.json"))
            if len(paths) > 1 and not _named(paths):
                listed = ", ".join(p.name for p in paths[:4])
                raise DataError(
                    f"{self.source}: {len(paths)} JSON files, {listed}; say which by "
                    "--annotations, with {split} where the split's name stands"
                )
        if not paths:
            wanted = pattern or "annotations/instances_*.json, */_annotations.coco.json or *.json"
            raise DataError(f"{self.source}: found no {wanted}; give the file as --annotations")
        return [self._open(folders.inside(self.source, path)) for path in paths]

    def _open(self, path: pathlib.Path) -> _File:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            lists = {key: content[key] for key in ("images", "annotations", "categories")}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected COCO's JSON, with images, annotations and categories: "
                f"{type(error).__name__}: {error}"
            ) from error
        panoptic = any("segments_info" in a for a in lists["annotations"])
        return _File(path, self._split(path), lists, panoptic)

    def _split(self, path: pathlib.Path) -> str:
        if path.name == _ROBOFLOW:
            name = path.parent.name
        else:
            kind, _, name = path.stem.partition("_")
            name = name if kind in _KINDS and name else "train"
            before, split, after = self.options.annotations.partition("{split}")
            if split:
                given = path.relative_to(self.source).as_posix()
                name = given[len(before) : len(given) - len(after)]
        return _SPLITS.get(name, name)

    def _categories(self) -> dict[int, int]:
        """{category id: class index or 255}, and sets the names of the classes."""
        named: dict[int, str] = {}
        for file in self._files:
            for category in file.content["categories"]:
                number, name = int(category["id"]), str(category["name"])
                if named.setdefault(number, name) != name:
                    raise DataError(
                        f"{file.path}: category {number} is {name!r}, in another file "
                        f"{named[number]!r}; export the splits together"
                    )
        chosen = [n.strip() for n in self.options.categories.split(",") if n.strip()]
        unknown = [n for n in chosen if n not in named.values()]
        if unknown and self._files:
            raise DataError(
                f"--categories has {', '.join(unknown)}; there are {', '.join(named.values())}"
            )
        counts = collections.Counter(
            number for file in self._files for number in _category_ids(file.content["annotations"])
        )
        kept = {n: name for n, name in sorted(named.items()) if not chosen or name in chosen}
        empty = [name for number, name in kept.items() if not counts[number]]
        if empty and not chosen and self._files:
            used = [name for number, name in kept.items() if counts[number]]
            raise DataError(
                f"{self.source}: no annotation at all of the categories {', '.join(empty)}; leave "
                f"them out by --categories '{','.join(used)}', or name all to keep them"
            )
        names = [name for name in kept.values() if not self._background or name != BACKGROUND]
        if len(set(names)) < len(names):
            twice = collections.Counter(names).most_common(1)[0][0]
            raise DataError(f"{self.source}: two categories have the name {twice!r}; rename one")
        self.class_names = [BACKGROUND, *names] if self._background else names
        return {number: self.class_names.index(name) for number, name in kept.items()}

    @property
    def recognised(self) -> str | None:
        """The kind of annotations, for a person."""
        return f"COCO {'panoptic' if self._files[0].panoptic else 'instances'}"

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """One for each JSON file; of one file, divided by name."""
        found: dict[str, list[Item]] = {}
        for file in self._files:
            if file.split in found:
                raise DataError(f"{file.path}: the split {file.split!r} is in another file, too")
            found[file.split] = self._items(file)
        if list(found) == ["train"]:
            return split_by_name(found["train"], self.options.validation_share)
        return found

    def _items(self, file: _File) -> list[Item]:
        of_image: dict[Any, list[Mapping[str, Any]]] = {}
        for annotation in file.content["annotations"]:
            of_image.setdefault(annotation["image_id"], []).append(annotation)
        listed = {image["id"]: image for image in file.content["images"]}
        if strangers := of_image.keys() - listed.keys():
            raise DataError(
                f"{file.path}: annotations of {len(strangers)} images that it does not list, such "
                f"as image_id {min(strangers, key=str)}"
            )
        items, missing = [], []
        for number, image in listed.items():
            path = self._image(file, str(image["file_name"]))
            if path is None:
                missing.append(str(image["file_name"]))
                continue
            size, annotations = (
                (int(image["height"]), int(image["width"])),
                of_image.get(number, ()),
            )
            label = file.path
            if file.panoptic:
                if len(annotations) != 1:
                    raise DataError(
                        f"{file.path}: {image['file_name']} has {len(annotations)} panoptic "
                        "annotations; expected one"
                    )
                label = self._png(file, str(annotations[0]["file_name"]))
            name = pathlib.PurePosixPath(str(image["file_name"])).with_suffix("").as_posix()
            items.append(Item(name, path, label, size, annotations, file.panoptic))
        if missing:
            raise DataError(
                f"{file.path}: {len(missing)} of {len(listed)} images are not there: "
                f"{', '.join(missing[:5])}; they are looked for beside the JSON, in images/, in "
                f"{file.split}/ and in images/{file.split}/"
            )
        return sorted(items, key=lambda item: item.name)

    def _image(self, file: _File, name: str) -> pathlib.Path | None:
        stem = file.path.stem.partition("_")[2]
        places = ["images", file.split, f"images/{file.split}", stem, f"images/{stem}", ""]
        for folder in (file.path.parent, *(self.source / place for place in places)):
            path = folder / name
            if path.is_file():
                return folders.inside(self.source, path)
        # Some tools write the folder that images lay in when they were annotated.
        base = pathlib.PurePath(name.replace("\\", "/")).name
        return self._image(file, base) if base != name else None

    def _png(self, file: _File, name: str) -> pathlib.Path:
        for folder in (file.path.with_suffix(""), self.source / file.path.stem, self.source):
            if (folder / name).is_file():
                return folders.inside(self.source, folder / name)
        raise DataError(
            f"{file.path}: {name} is not there; it is looked for in {file.path.stem}/ beside the "
            "JSON and below --source"
        )

    def source_files(self) -> Sequence[pathlib.Path]:
        """Images, the JSON files and the PNGs of panoptic annotations."""
        items = [item for items in self.splits().values() for item in items]
        read = {path for item in items for path in (item.image, item.label)}
        return sorted(read | {file.path for file in self._files})

    def read(self, item: Item) -> builder.Example:
        """Draws the objects of one image, the largest first."""
        image, size = images.load_image(item.image, self.options.image_bits)
        outlines.check_size(item.image, size, item.size)
        label = self._panoptic(item) if item.panoptic else self._drawn(item)
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def _drawn(self, item: Item) -> np.ndarray:
        label = np.full(item.size, 0 if self._background else IGNORE_LABEL, np.uint8)
        drawn = []
        for annotation in item.annotations:
            value = self._class_of(annotation["category_id"], item)
            if value is None:
                continue
            covered = _mask(annotation, item, self.options.outside == "cut")
            value = IGNORE_LABEL if annotation.get("iscrowd") else value
            drawn.append((int(covered.sum()), value, covered))
        for _, value, covered in sorted(drawn, key=lambda entry: -entry[0]):
            label[covered] = value
        return label

    def _panoptic(self, item: Item) -> np.ndarray:
        with PIL.Image.open(item.label) as picture:
            rgb = np.asarray(picture.convert("RGB")).astype(np.int64)
        numbers = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        label = np.full(numbers.shape, IGNORE_LABEL, np.uint8)
        left = set(np.unique(numbers).tolist()) - {0}
        for segment in item.annotations[0]["segments_info"]:
            value = self._class_of(segment["category_id"], item)
            left.discard(int(segment["id"]))
            if value is not None and not segment.get("iscrowd"):
                label[numbers == int(segment["id"])] = value
        if left:
            raise DataError(
                f"{item.label}: segment {min(left)} and {len(left) - 1} more are in the PNG and "
                "not in the JSON; export both anew"
            )
        return label

    def _class_of(self, category: Any, item: Item) -> int | None:
        """The class of a category id; None where --categories leaves it out."""
        if category in self._values:
            return self._values[category]
        if self.options.categories:
            return None
        raise DataError(
            f"{item.name}: an annotation has category_id {category}, which is not among the "
            f"categories {sorted(self._values)}"
        )


def _named(paths: Sequence[pathlib.Path]) -> bool:
    """Whether their names tell their splits."""
    return all(p.name == _ROBOFLOW or p.stem.partition("_")[0] in _KINDS for p in paths)


def _category_ids(annotations: Sequence[Mapping[str, Any]]) -> list[int]:
    return [
        segment["category_id"]
        for annotation in annotations
        for segment in annotation.get("segments_info", (annotation,))
    ]


def _mask(annotation: Mapping[str, Any], item: Item, cut: bool) -> np.ndarray:
    """The pixels `[H, W]` that an annotation covers, as pycocotools draws them."""
    coco = outlines.library()
    height, width = item.size
    where = f"{item.label}: annotation {annotation.get('id')} of {item.name}"
    shape = annotation.get("segmentation")
    if not shape:
        raise DataError(
            f"{where} has no segmentation{', only a box' if 'bbox' in annotation else ''}; this "
            "needs outlines: export polygons or masks"
        )
    if isinstance(shape, Mapping):
        if list(shape.get("size", ())) != [height, width]:
            raise DataError(f"{where} is a mask of size {shape.get('size')}; expected {item.size}")
        if isinstance(shape["counts"], list):
            shape = coco.frPyObjects(dict(shape), height, width)
        return coco.decode(shape).astype(bool)
    return outlines.inside_of(
        [np.asarray(p, np.float64).ravel() for p in shape], item.size, where, cut
    )
