r"""annotation_json: what labelme saves, and what Label Studio exports as JSON.

    pip install -e '.[coco]'
    python -m dilaff_jax.data.prepare --dataset annotation_json --name street --source DIR \
        --data_dir data

and then `config.dataset = "annotation_json/street"`. Found below --source:

    NAME.json beside NAME.jpg, or in train/, val/ ...    labelme
    a single .json, images in images/ or beside it       Label Studio, "JSON"

Classes are the labels in alphabetical order, or as --classes lists them. What no shape covers is
the class `background`, which comes first, or with --uncovered ignore is ignored; so is what is
labelled `__ignore__`. A shape that comes later lies on top, as in both tools.
"""

import base64
import binascii
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dilaff_jax.data import builder, folders, images, outlines
from dilaff_jax.data.class_list import colormap
from dilaff_jax.data.coco_json import BACKGROUND
from dilaff_jax.data.image_folder import option, split_by_name
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

_IGNORED = "__ignore__"
_SPLITS = dict.fromkeys(("val", "valid"), "validation")
# Points of the polygon as which a circle or an ellipse is drawn.
_ROUND = 64
# Of regions that Label Studio exports: those that cover an area.
_AREAS = ("polygonlabels", "rectanglelabels", "ellipselabels", "brushlabels")
# What Label Studio puts before the name of a file that was uploaded.
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")


@dataclasses.dataclass(frozen=True)
class AnnotationOptions(builder.Options):
    """What the builder can be told."""

    classes: str = option("", "NAME,NAME,...: the labels that are classes; others are left out.")
    uncovered: str = option(BACKGROUND, "What no shape covers: 'background' or 'ignore'.")
    outside: str = option("stop", "Shapes that leave their image: 'stop' or 'cut'.")
    validation_share: float = option(0.1, "Share taken for validation if there is one split only.")


class Item(NamedTuple):
    """An image, the JSON file that speaks of it, and what it says: as each tool has it."""

    name: str
    split: str
    image: pathlib.Path
    label: pathlib.Path
    size: tuple[int, int] | None
    said: Sequence[Mapping[str, Any]]


class Builder(builder.SegmentationBuilder):
    """Splits are folders, or one divided by name; see the module's docstring."""

    name = "annotation_json"
    options_type = AnnotationOptions
    options: AnnotationOptions

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outlines.check_choice("uncovered", self.options.uncovered, (BACKGROUND, "ignore"))
        outlines.check_choice("outside", self.options.outside, ("stop", "cut"))
        self._tool = ""
        # A set that is only read back has no source.
        self._items = self._find() if kwargs.get("source") else []
        labels = {_label_of(said, item) for item in self._items for said in item.said}
        chosen = [n.strip() for n in self.options.classes.split(",") if n.strip()]
        unknown = [n for n in chosen if n not in labels]
        if unknown and self._items:
            raise DataError(
                f"--classes has {', '.join(unknown)}; there are {', '.join(sorted(labels))}"
            )
        covers = self.options.uncovered == BACKGROUND
        names = chosen or sorted(labels - {_IGNORED})
        names = [n for n in names if not covers or n != BACKGROUND]
        self.class_names = [BACKGROUND, *names] if covers else names
        palette = colormap(len(self.class_names) + 1)
        self.colors = palette[:-1] if covers else palette[1:]

    @property
    def recognised(self) -> str | None:
        """The tool, for a person."""
        return self._tool

    def _find(self) -> list[Item]:
        files = {}
        for path in sorted(self.source.rglob("*.json")):
            if not any(map(folders.hidden, path.relative_to(self.source).parts)):
                files[path] = _read(folders.inside(self.source, path))
        labelme = {p: c for p, c in files.items() if isinstance(c, dict) and "shapes" in c}
        exports = {p: c for p, c in files.items() if _is_export(c)}
        if labelme and exports:
            raise DataError(
                f"{self.source}: both labelme's files, such as {min(labelme).name}, and Label "
                f"Studio's {min(exports).name}; give the folder of one of them"
            )
        if len(exports) > 1:
            listed = ", ".join(p.name for p in exports)
            raise DataError(f"{self.source}: {len(exports)} exports, {listed}; keep one")
        if exports:
            self._tool = "Label Studio"
            ((path, tasks),) = exports.items()
            return [self._of_task(path, task) for task in tasks]
        if labelme:
            self._tool = "labelme"
            return [self._of_file(path, content) for path, content in labelme.items()]
        raise DataError(
            f"{self.source}: found no .json of labelme's (with `shapes`) nor an export of Label "
            "Studio's (a list of tasks with `annotations`; its format is called JSON, not JSON-MIN)"
        )

    def _of_file(self, path: pathlib.Path, content: Mapping[str, Any]) -> Item:
        given = str(content.get("imagePath", "")).replace("\\", "/")
        places = [path.parent / given, path.parent / pathlib.PurePosixPath(given).name]
        image = next((p for p in places if given and p.is_file()), None)
        if image is None:
            raise DataError(f"{path}: its image {given or '(none is named)'} is not there")
        parts = path.relative_to(self.source).parts
        split = _SPLITS.get(parts[0], parts[0]) if len(parts) > 1 else "train"
        size = None
        if content.get("imageHeight") and content.get("imageWidth"):
            size = int(content["imageHeight"]), int(content["imageWidth"])
        name = pathlib.PurePosixPath(*parts[1:] or parts).with_suffix("").as_posix()
        image = folders.inside(self.source, image)
        return Item(name, split, image, path, size, content["shapes"])

    def _of_task(self, path: pathlib.Path, task: Mapping[str, Any]) -> Item:
        number = task.get("id")
        done = [a for a in task["annotations"] if not a.get("was_cancelled")]
        best = [a for a in done if a.get("ground_truth")]
        if len(best or done) != 1:
            raise DataError(
                f"{path}: task {number} has {len(best or done)} annotations; expected one, or one "
                "that is marked as ground truth"
            )
        said = (best or done)[0]["result"]
        regions = [r for r in said if r.get("type") in _AREAS]
        other = {str(r.get("type")) for r in said} - {*_AREAS, "choices", "taxonomy", "textarea"}
        if other:
            raise DataError(
                f"{path}: task {number} has {', '.join(sorted(other))}, which cover no area; "
                f"expected {', '.join(_AREAS)}"
            )
        sizes = {(int(r["original_height"]), int(r["original_width"])) for r in regions}
        if len(sizes) > 1:
            raise DataError(f"{path}: task {number} speaks of images of {sorted(sizes)}")
        image = self._uploaded(path, task)
        name = _UPLOADED.sub("", image.stem)
        return Item(name, "train", image, path, next(iter(sizes), None), regions)

    def _uploaded(self, path: pathlib.Path, task: Mapping[str, Any]) -> pathlib.Path:
        """The image of a task: by its name, with or without what uploading put before it."""
        given = [v for v in task["data"].values() if isinstance(v, str)]
        for value in given:
            local = value.split("?d=")[-1].replace("\\", "/")
            base = pathlib.PurePosixPath(local).name
            for name in (local.lstrip("/"), base, _UPLOADED.sub("", base)):
                for folder in (path.parent, self.source / "images", self.source):
                    if (folder / name).is_file():
                        return folders.inside(self.source, folder / name)
        raise DataError(
            f"{path}: the image of task {task.get('id')} is not there: "
            f"{', '.join(given)[:200] or 'none is named'}; it is looked for beside the JSON and in "
            "images/"
        )

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """Folders that hold files, or all divided by name."""
        found: dict[str, list[Item]] = {}
        for item in self._items:
            found.setdefault(item.split, []).append(item)
        if len(found) == 1:
            return split_by_name(self._items, self.options.validation_share)
        return found

    def source_files(self) -> Sequence[pathlib.Path]:
        """Images and the JSON files."""
        return sorted({path for item in self._items for path in (item.image, item.label)})

    def read(self, item: Item) -> builder.Example:
        """Draws the shapes of one image, in their order."""
        image, size = images.load_image(item.image, self.options.image_bits)
        outlines.check_size(item.image, size, item.size or size)
        uncovered = 0 if self.options.uncovered == BACKGROUND else IGNORE_LABEL
        label = np.full(size, uncovered, np.uint8)
        for number, said in enumerate(item.said):
            where = f"{item.label}: shape {number} of {item.name}"
            name = _label_of(said, item)
            if name != _IGNORED and name not in self.class_names:
                continue  # --classes leaves it out
            shape_of = _labelme if "points" in said else _label_studio
            covered = shape_of(said, size, where)
            if covered.dtype != bool:
                cut = self.options.outside == "cut"
                covered = outlines.inside_of([covered], size, where, cut)
            label[covered] = IGNORE_LABEL if name == _IGNORED else self.class_names.index(name)
        return builder.Example(item.name, image, size, label, item.image, item.label)


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def _is_export(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(t, dict) and "data" in t and "annotations" in t for t in content)
    )


def _label_of(said: Mapping[str, Any], item: Item) -> str:
    if "label" in said:
        return str(said["label"])
    named = said["value"].get(said["type"], [])
    if len(named) != 1:
        raise DataError(
            f"{item.label}: a {said['type']} of {item.name} has {len(named)} labels; expected one"
        )
    return str(named[0])


def _labelme(said: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """A shape as a polygon `[2·n]`, or a mask: bool `[H, W]`."""
    kind = said.get("shape_type") or "polygon"
    points = np.asarray(said["points"], np.float64).reshape(-1, 2)
    if kind == "polygon":
        return points.ravel()
    if kind in ("rectangle", "mask") and len(points) == 2:
        (left, top), (right, bottom) = np.sort(points, axis=0)
        if kind == "mask":
            return _pasted(said.get("mask"), size, round(top), round(left), where)
        return np.array([left, top, right, top, right, bottom, left, bottom])
    if kind == "circle" and len(points) == 2:
        radius = np.hypot(*(points[1] - points[0]))
        return _ellipse(points[0], (radius, radius), 0.0)
    raise DataError(
        f"{where} is a {kind} of {len(points)} points, which covers no area; draw polygons, "
        "rectangles or circles, or remove it"
    )


def _pasted(encoded: Any, size: tuple[int, int], top: int, left: int, where: str) -> np.ndarray:
    """Labelme's masks: a PNG in base64 with its place."""
    try:
        with PIL.Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as picture:
            part = np.asarray(picture).astype(bool)
    except (TypeError, ValueError, binascii.Error, OSError) as error:
        raise DataError(f"{where}: its mask is no PNG in base64: {error}") from error
    result = np.zeros(size, bool)
    bottom, right = top + part.shape[0], left + part.shape[1]
    if part.ndim != 2 or top < 0 or left < 0 or bottom > size[0] or right > size[1]:
        raise DataError(f"{where}: its mask of {part.shape} at {top}, {left} leaves the image")
    result[top:bottom, left:right] = part
    return result


def _label_studio(said: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """A region as a polygon `[2·n]`, or a mask: bool `[H, W]`. Its numbers are per cent."""
    value = said["value"]
    scale = np.array([size[1], size[0]]) / 100
    if said["type"] == "brushlabels":
        if value.get("format") != "rle":
            raise DataError(f"{where}: a brush of format {value.get('format')}; expected rle")
        pixels = _run_lengths(value["rle"], where)
        if pixels.size != 4 * size[0] * size[1]:
            raise DataError(f"{where}: its brush is not of the image's size {size}")
        return pixels.reshape(*size, 4)[..., 3] > 0
    if said["type"] == "polygonlabels":
        return (np.asarray(value["points"], np.float64).reshape(-1, 2) * scale).ravel()
    turned = np.deg2rad(value.get("rotation") or 0)
    corner = np.array([value["x"], value["y"]]) * scale
    if said["type"] == "ellipselabels":
        radii = np.array([value["radiusX"], value["radiusY"]]) * scale
        return _ellipse(corner, radii, turned)
    width, height = np.array([value["width"], value["height"]]) * scale
    across = np.array([np.cos(turned), np.sin(turned)]) * width
    down = np.array([-np.sin(turned), np.cos(turned)]) * height
    return np.concatenate([corner, corner + across, corner + across + down, corner + down])


def _ellipse(centre: np.ndarray, radii: Sequence[float] | np.ndarray, turned: float) -> np.ndarray:
    angle = 2 * np.pi * np.arange(_ROUND) / _ROUND
    x, y = radii[0] * np.cos(angle), radii[1] * np.sin(angle)
    cosine, sine = np.cos(turned), np.sin(turned)
    return (centre + np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)).ravel()


def _run_lengths(data: Sequence[int], where: str) -> np.ndarray:
    """Label Studio's brushes (its `@thi.ng/rle-pack`): RGBA values, uint8, from a stream of bits.

    32 bits of how many values there are, 5 of the bits of a value less one, 4 times 4 of the bits
    of a length less one; then blocks: a bit, 1 for a run, 2 for which kind of length, the length
    less one, and one value, or as many as the length says.
    """
    bits = _Bits(np.asarray(data, np.uint8))
    try:
        count, width = bits.read(32), bits.read(5) + 1
        lengths = [bits.read(4) + 1 for _ in range(4)]
        result = np.zeros(count, np.uint8)
        at = 0
        while at < count:
            is_run = bits.read(1)
            end = at + 1 + bits.read(lengths[bits.read(2)])
            if is_run:
                result[at:end] = bits.read(width)
            else:
                for place in range(at, min(end, count)):
                    result[place] = bits.read(width)
            at = end
    except (EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: its brush is damaged: {error}") from error
    return result


class _Bits:
    """Numbers of so many bits from bytes, the highest first."""

    def __init__(self, data: np.ndarray) -> None:
        self._bits: Iterator[int] = iter(np.unpackbits(data).tolist())

    def read(self, count: int) -> int:
        number = 0
        for _ in range(count):
            try:
                number = 2 * number + next(self._bits)
            except StopIteration:
                raise EOFError("it ends too early") from None
        return number
