"""Files that are replaced at once: whoever reads sees the old content or the new, never a part."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

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


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """The path, `~` expanded, of something on a disk.

    Raises:
        UserError: it is a URL such as gs://..., which `pathlib` would take for a folder named gs:.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(
            f"{what} is {text!r}, and only disks are read and written: mount the bucket (gcsfuse, "
            "s3fs), or copy it, and give the folder"
        )
    return pathlib.Path(text).expanduser()
