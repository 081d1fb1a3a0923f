"""Files that are replaced at once: whoever reads sees the old content or the new, never a part."""

import contextlib
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

from dilaff_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, keep_suffix: bool = False) -> Iterator[pathlib.Path]:
    """Yields a path beside `path`, to be written to; it takes the place of `path` at the end.

    Where the writing fails, what was written is removed and `path` stays as it was. A process that
    is killed leaves NAME.part, which the next one writes over.

    Args:
        path: its folder is made where it does not exist.
        keep_suffix: NAME.part.SUFFIX, for writers that choose a format by the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{path.stem}.part{path.suffix}" if keep_suffix else f"{path.name}.part"
    part = path.with_name(name)
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, UTF-8, see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null: JSON has no NaN, readers refuse it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """The path, `~` expanded, of something on a disk.

    Raises:
        UserError: it is a URL such as gs://..., which `pathlib` would take for a folder named gs:.
    """
    text = os.fspath(path)
    if re.match(r"(gs|s3|hf):/[^/]", text):
        raise UserError(
            f"{what} is {text!r}, which has lost a slash; give text, not a pathlib.Path"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(
            f"{what} is {text!r}, and here only disks are read and written: give a folder, copied "
            "or mounted"
        )
    return pathlib.Path(text).expanduser()


def without_patterns(folder: pathlib.Path) -> pathlib.Path:
    """Another way to `folder`, for libraries that take names for patterns; itself if none would.

    What Orbax finds by `glob` below run[1] it looks for below run1. So it gets a link in a folder
    of this user, under the system's folder for temporary files. The link has the same name in every
    process, on every machine; it may be removed when nothing runs.

    Args:
        folder: absolute.

    Raises:
        UserError: there is no safe place for the link.
    """
    if glob.escape(os.fspath(folder)) == os.fspath(folder):
        return folder
    owner = os.getuid() if hasattr(os, "getuid") else None
    links = pathlib.Path(tempfile.gettempdir()) / f"dilaff_jax-{owner}"
    links.mkdir(mode=0o700, exist_ok=True)
    about = links.lstat()
    others_write = owner is not None and (about.st_uid != owner or about.st_mode & 0o022)
    if not stat.S_ISDIR(about.st_mode) or others_write or glob.escape(str(links)) != str(links):
        raise UserError(
            f"{folder}: a name with one of * ? [ needs a link in {links}, which is no folder that "
            "this user alone can write to; remove it, set TMPDIR, or use another name"
        )
    link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    return link
