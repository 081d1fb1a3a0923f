"""What a data set was prepared from: name, size, time and checksum of every file.

So that preparing it again, after masks were corrected or images added, does not pass for done.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files

_FILE = "source_files.json"
_CHUNK = 1 << 24


def write(folder: pathlib.Path, source: pathlib.Path, paths: Iterable[pathlib.Path]) -> None:
    """Records the files `paths` below `source` in FOLDER/source_files.json."""
    listed = sorted(set(paths))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib leaves the interpreter free
        sums = tqdm(
            pool.map(checksum, listed), "checksums", len(listed), unit="file", delay=3, leave=False
        )
        entries = {
            path.relative_to(source).as_posix(): [*_stat(path), value]
            for path, value in zip(listed, sums, strict=True)
        }
    content = {"source": os.fspath(source), "files": entries}
    files.write_text(folder / _FILE, json.dumps(content) + "\n")


def exists(folder: pathlib.Path) -> bool:
    """Whether a prepared data set has such a record; older ones have none."""
    return (folder / _FILE).is_file()


def differences(
    folder: pathlib.Path, source: pathlib.Path, paths: Iterable[pathlib.Path] | None
) -> list[str]:
    """What is not as it was recorded: "2 files added (a.png, b.png)", and so on; [] if nothing is.

    A file of the same size and time is taken for the same; one of another time is read. Where
    `paths` is None, only the recorded files are looked at, and none can have been added.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / _FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        stored: dict[str, list[int]] = content["files"]
        if paths is None:
            paths = [path for name in stored if (path := source / name).is_file()]
        now = {p.relative_to(source).as_posix(): p for p in paths}
        changed = [n for n, p in now.items() if n in stored and not _same(p, stored[n])]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); prepare the data set with --overwrite") from e
    groups = {
        "added": sorted(now.keys() - stored.keys()),
        "changed": sorted(changed),
        "gone": sorted(stored.keys() - now.keys()),
    }
    return [f"{listed(names)} {verb}" for verb, names in groups.items() if names]


def listed(names: list[str]) -> str:
    """Such as: 3 files (a, b, c); no more than three names."""
    more = ", ..." if len(names) > 3 else ""
    count = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"{count} ({', '.join(names[:3])}{more})"


def checksum(path: pathlib.Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _stat(path: pathlib.Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _same(path: pathlib.Path, stored: list[int]) -> bool:
    size, time, value = stored
    return _stat(path) == (size, time) or (_stat(path)[0] == size and checksum(path) == value)
