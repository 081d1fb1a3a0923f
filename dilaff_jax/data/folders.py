"""Strangers' folders and archives: pairing images with masks, and never leaving the folder."""

import hashlib
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dilaff_jax.data.images import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"),
)


class Pair(NamedTuple):
    """One image and its label map, as files; `name` is unique within the split."""

    name: str
    image: pathlib.Path
    label: pathlib.Path


def inside(root: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Returns `path` if, links followed, it is in `root`. Raises DataError otherwise."""
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise DataError(
            f"{path}: is a symbolic link, or behind one, that leaves the source folder {root} "
            f"(to {target}); copy the files into the folder or give their real folder as --source"
        )
    return path


def folder(root: pathlib.Path, *choices: str) -> pathlib.Path:
    """The first of `choices` that is a folder in `root`. Raises DataError naming all of them."""
    for choice in choices:
        if (root / choice).is_dir():
            return inside(root, root / choice)
    wanted = " or ".join(str(root / c) for c in choices)
    raise DataError(f"found no folder {wanted}; check --source and the layout it should have")


def hidden(name: str) -> bool:
    """Whether a file or folder is a program's own, such as .ipynb_checkpoints, @eaDir, __MACOSX."""
    return name.startswith((".", "@", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def files_below(root: pathlib.Path, directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below `directory`, sorted, but for hidden ones and those in hidden folders.

    Raises DataError for links that leave `root`, or that lead to a folder a second time.
    """
    visited: set[pathlib.Path] = set()
    for parent, folders, files in os.walk(inside(root, directory), followlinks=True):
        real = inside(root, pathlib.Path(parent)).resolve()
        if real in visited:
            raise DataError(f"{parent}: a symbolic link leads to {real} a second time; remove it")
        visited.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        yield from (pathlib.Path(parent, file) for file in sorted(files) if not hidden(file))


def suffix_of(name: str, suffixes: Sequence[str]) -> str:
    """The longest suffix that a name ends with (`.nii.gz` before `.gz`), as written, or ""."""
    found = max((s for s in suffixes if name.lower().endswith(s)), key=len, default="")
    return name[len(name) - len(found) :]


def image_files(
    root: pathlib.Path, directory: pathlib.Path, suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> dict[str, pathlib.Path]:
    """Image files below `directory`, sorted: {relative path without suffix: file}.

    Hidden files and other file types are passed over. Raises DataError for two images of one name
    (`a.jpg` and `a.png`), and for links that leave `root`.
    """
    by_name: dict[str, pathlib.Path] = {}
    for path in files_below(root, directory):
        found = suffix_of(path.name, suffixes)
        if not found:
            continue
        name = path.relative_to(directory).as_posix().removesuffix(found)
        if name in by_name:
            raise DataError(f"{path} and {by_name[name]} have one name; remove or rename one")
        by_name[name] = inside(root, path)
    return dict(sorted(by_name.items()))


def pair_up(
    root: pathlib.Path,
    images: pathlib.Path,
    labels: pathlib.Path,
    image_suffix: str = "",
    label_suffix: str = "",
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    label_suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> list[Pair]:
    """Pairs every image with the mask of the same name.

    Args:
        root: The source folder, which no file may leave.
        images: Folder of images; subfolders are part of the name.
        labels: Folder of label maps.
        image_suffix: What follows the common name in an image's name (`_leftImg8bit`).
        label_suffix: What follows the common name in a mask's name (`_L`, `_mask`).
        suffixes: Of files that may be images.
        label_suffixes: Of files that may be masks.

    Returns:
        Pairs sorted by name.

    Raises:
        DataError: no image at all, or images without a mask (the first five are named).
    """
    by_name = image_files(root, images, suffixes)
    masks = image_files(root, labels, label_suffixes)
    names = {
        n.removesuffix(image_suffix): f
        for n, f in by_name.items()
        # In one folder, a mask is no image.
        if n.endswith(image_suffix) and not (images == labels and n.endswith(label_suffix))
    }
    if not names:
        raise DataError(f"{images}: no images named *{image_suffix}{list(suffixes)}")
    missing = [n for n in names if n + label_suffix not in masks]
    if missing:
        first = ", ".join(f"{labels / (n + label_suffix)}.* for {names[n]}" for n in missing[:5])
        raise DataError(
            f"{len(missing)} of {len(names)} images have no mask: {first}; add the masks, remove "
            "the images, or state how mask names differ (--mask_suffix of image_folder)"
        )
    return [Pair(n, file, masks[n + label_suffix]) for n, file in names.items()]


def extract(archive: pathlib.Path, target: pathlib.Path) -> None:
    """Unpacks a tar or zip archive into `target`.

    Raises:
        DataError: a member that would leave `target` (absolute path, `..`, link), a device file,
            or a damaged archive. Members before it may have been written, all inside `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            _extract_zip(archive, target)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    except tarfile.FilterError as e:
        raise DataError(
            f"{archive}: {e}; this is not the official archive, nothing of it is used"
        ) from e
    except (DataError, MemoryError):
        raise
    except Exception as e:  # the codecs raise nearly anything on broken files
        raise DataError(f"{archive}: damaged or incomplete archive: {e}; download it again") from e


def _extract_zip(archive: pathlib.Path, target: pathlib.Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            path = pathlib.PurePosixPath(member.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
                raise DataError(
                    f"{archive}: member {member!r} would leave the folder it is unpacked to; this "
                    "is not the official archive, nothing of it is used"
                )
        file.extractall(target)


def unpacked(
    source: pathlib.Path, target: pathlib.Path, wanted: str, archives: Sequence[str]
) -> pathlib.Path:
    """The folder `wanted`, from `source` if it lies there unpacked, else from its archives.

    Args:
        source: Where the person has the data set.
        target: Scratch folder for unpacking.
        wanted: Path of the folder in the archive, such as `VOCdevkit/VOC2012`.
        archives: Names of the official archives that hold it, all of which are unpacked.

    Returns:
        The folder's path, below `source` or `target`.

    Raises:
        DataError: neither is there, or an archive is damaged or malicious.
    """
    if (source / wanted).is_dir():
        return inside(source, source / wanted)
    missing = [name for name in archives if not (source / name).is_file()]
    if missing:
        raise DataError(
            f"{source}: found neither the folder {wanted} nor the archive {' and '.join(missing)}; "
            "download it from the data set's page and give its folder as --source"
        )
    for name in archives:
        extract(inside(source, source / name), target)
    if not (target / wanted).is_dir():
        raise DataError(f"{', '.join(archives)}: unpacked, but there is no folder {wanted} in it")
    return target / wanted


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
