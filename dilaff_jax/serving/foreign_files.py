"""Files in which other networks' results are kept: logits, probabilities, or label maps."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np

from dilaff_jax import labels as labels_lib
from dilaff_jax.data import folders, images, source_record
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.numerics import TINY

Layout: TypeAlias = Literal["hwc", "chw"]

ARRAYS = (".npy", ".npz")
# Names under which one array of several in a .npz is the one that is meant.
_MEANT = ("logits", "probs", "probabilities")
# How far from 1 a sum of probabilities in half precision may be.
_ROUNDING = 0.02
# How far a result's shape may be from its image's, beside the rounding of its size.
_STRETCH = 0.05


@dataclasses.dataclass(frozen=True)
class Form:
    """How results are to be read.

    Attributes:
        layout: of arrays, "hwc" or "chw"; None where the number of classes tells it.
        align_corners: whether their network enlarges them with corners aligned.
        confidence: of label maps: the probability of the class that is named, in (0, 1); the others
            share the rest. None where label maps are not expected.
        num_classes: C; 0 where any will do.
    """

    layout: Layout | None = None
    align_corners: bool = False
    confidence: float | None = None
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise UserError(
                f"confidence is {self.confidence}; expected a probability above 0 and below 1, "
                "such as 0.9"
            )


def find(
    folder: pathlib.Path, names: Iterable[str], what: str, suffixes: tuple[str, ...]
) -> dict[str, pathlib.Path]:
    """{name: file of that name in the folder}, without its suffix.

    Args:
        folder: of the files; folders below it are part of the names, as with images. Of one image
            it may be the file itself.
        names: of the images.
        what: a file of it is called, for messages.
        suffixes: of files that count.

    Raises:
        FileNotFoundError: no such folder.
        UserError: an image without a file, a file without an image, two files of one name.
    """
    wanted = set(names)
    if folder.is_file() and len(wanted) == 1:
        return dict.fromkeys(wanted, folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of the {what}s")
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or any(map(folders.hidden, relative.parts)):
            continue
        name = relative.with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} are of one image; keep one of them")
        found[name] = path
    missing, extra = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    for these, problem in ((missing, f"without a {what} in"), (extra, "without an image, in")):
        if these:
            raise UserError(
                f"{source_record.listed(these)} {problem} {folder}: each image needs a {what} of "
                f"its name ({', '.join(suffixes)}), and each {what} an image"
            )
    return found


def read(path: pathlib.Path, form: Form, size: tuple[int, int]) -> np.ndarray:
    """The logits of one image, float32 `[h, w, C]`; of probabilities and labels, their logarithms.

    An array is of probabilities where all values are in [0, 1] and those of a pixel sum to 1.

    Args:
        path: `.npy`, `.npz` (one array, or one called logits, probs or probabilities), or a label
            map that `images.load_label` reads.
        form: see `Form`.
        size: (height, width) of the image.

    Raises:
        DataError: the file is damaged or holds what cannot be meant.
    """
    if path.suffix.lower() in ARRAYS:
        logits = np.array(classes_last(mapped(path), path, form), np.float32, order="C")
        check_values(logits, path)
        if are_probabilities(logits):
            logits = logarithm(logits)
    else:
        confidence = confidence_of(path, form)
        logits = of_labels(read_labels(path, form.num_classes), confidence, form.num_classes)
    _check_size(logits, size, path)
    return logits


def read_labels(
    path: pathlib.Path, num_classes: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """A label map of classes 0 to C - 1 and 255, uint8 `[H, W]`.

    Args:
        path: that `images.load_label` reads.
        num_classes: C.
        size: (height, width) of its image; None where it is checked elsewhere.

    Raises:
        DataError: the file is damaged, of another size, or holds other values.
    """
    label = images.load_label(path)
    if size is not None and label.shape != tuple(size):
        raise DataError(
            f"{path}: {label.shape[0]} x {label.shape[1]} pixels; its image has "
            f"{size[0]} x {size[1]}"
        )
    check_labels(label, num_classes, path)
    return label.astype(np.uint8)


def check_labels(labels: np.ndarray, num_classes: int, path: pathlib.Path) -> None:
    """Raises DataError for labels that are neither classes 0 to C - 1 nor 255."""
    try:
        labels_lib.check_values(labels, num_classes, IGNORE_LABEL)
    except UserError as error:
        raise DataError(f"{path}: {error}") from error


def count_classes(path: pathlib.Path, form: Form) -> int:
    """How many classes an array is of; 0 where nobody says which axis is theirs."""
    if form.layout is None:
        return 0
    return mapped(path).shape[-1 if form.layout == "hwc" else 0]


def mapped(path: pathlib.Path) -> np.ndarray:
    """The array of a file, floating point with three axes; of a `.npy` not read before it is used.

    Raises:
        DataError: there is no such array.
    """
    try:
        content = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(content, np.ndarray):
            array = content
        else:
            with content:
                array = content[_entry(content.files, path)]
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as e:
        raise DataError(f"{path}: no array that NumPy reads without unpickling: {e}") from e
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise DataError(
            f"{path}: shape {array.shape}, {array.dtype}; expected floating point [h, w, C] or "
            "[C, h, w] (label maps: as PNG)"
        )
    return array


def _entry(names: list[str], path: pathlib.Path) -> str:
    meant = names if len(names) == 1 else [n for n in names if n in _MEANT]
    if len(meant) != 1:
        raise DataError(
            f"{path}: holds the arrays {', '.join(names) or 'none'}; keep one, or call the one "
            f"that is meant {_MEANT[0]!r}"
        )
    return meant[0]


def classes_last(array: np.ndarray, path: pathlib.Path, form: Form) -> np.ndarray:
    """An array as `[h, w, C]`. Raises DataError where its layout is not known or not that."""
    layout, classes = form.layout, form.num_classes
    if layout is None:
        fits: dict[Layout, bool] = {
            "hwc": array.shape[-1] == classes,
            "chw": array.shape[0] == classes,
        }
        fitting = [name for name, fit in fits.items() if fit]
        if len(fitting) != 1:
            known = f"{classes} classes" if classes else "any number of classes"
            raise DataError(
                f"{path}: shape {array.shape}, for {known}: give --layout=hwc if the last axis is "
                "that of the classes, --layout=chw if the first is"
            )
        layout = fitting[0]
    array = np.moveaxis(array, 0, -1) if layout == "chw" else array
    if classes and array.shape[-1] != classes:
        raise DataError(
            f"{path}: {array.shape[-1]} classes, as --layout={layout} reads it; expected {classes}"
        )
    return array


def check_values(array: np.ndarray, path: pathlib.Path) -> None:
    """Raises DataError for NaN, +inf, and pixels at which no class is possible."""
    if np.isnan(array).any() or np.isposinf(array).any():
        raise DataError(f"{path}: holds NaN or +infinity; expected finite numbers, or -infinity")
    if np.isneginf(array).all(axis=-1).any():
        raise DataError(f"{path}: at some pixel all classes are -infinity, so none is possible")


def logarithm(probs: np.ndarray) -> np.ndarray:
    """Logits of probabilities; none is -infinity."""
    return np.log(np.maximum(probs, TINY))


def are_probabilities(array: np.ndarray) -> bool:
    """Whether all values are in [0, 1] and those of a pixel sum to 1."""
    return bool(
        array.min() >= 0
        and array.max() <= 1
        and np.abs(array.sum(axis=-1, dtype=np.float64) - 1).max() <= _ROUNDING
    )


def confidence_of(path: pathlib.Path, form: Form) -> float:
    """How sure label maps are. Raises DataError where the form does not say."""
    if form.confidence is None:
        raise DataError(
            f"{path}: a label map says nothing of how sure it is; give --confidence=0.9, the "
            "probability of its classes, or give logits"
        )
    return form.confidence


def of_labels(labels: np.ndarray, confidence: float, classes: int) -> np.ndarray:
    """Logits of labels `[h, w]`, checked ones, that are so sure: float32 `[h, w, C]`."""
    valid = labels != IGNORE_LABEL
    rest = (1 - confidence) / max(classes - 1, 1)
    probs = np.full((*labels.shape, classes), rest, np.float32)
    np.put_along_axis(
        probs, np.where(valid, labels, 0).astype(np.int64)[..., None], confidence, axis=-1
    )
    probs[~valid] = 1 / classes
    return np.log(probs)


def _check_size(logits: np.ndarray, size: tuple[int, int], path: pathlib.Path) -> None:
    """Raises DataError for a map that cannot be of the whole image, whatever its stride."""
    height, width = logits.shape[:2]
    # Rounded up or down, or with corners aligned, by at most a cell.
    stretch = (height / size[0]) / (width / size[1])
    room = 1 + _STRETCH + 1.5 / min(height, width)
    if not 1 / room <= stretch <= room or height > size[0] or width > size[1]:
        raise DataError(
            f"{path}: {height} x {width} values for an image of {size[0]} x {size[1]} pixels; "
            "expected those of the whole image, at any stride, without padding"
        )
