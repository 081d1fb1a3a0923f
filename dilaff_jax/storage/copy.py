"""A folder of a bucket and its copy on a disk, and what has changed in either."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from absl import logging
from tqdm import tqdm

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files
from dilaff_jax.storage.bucket import Bucket, Item

# By these a folder is taken for whole.
_MARKS = ("_CHECKPOINT_METADATA", "dataset_info.json", "features.json")
_CHECKPOINT = re.compile(r"(.*/)?checkpoints/\d+(?=/)")
# What is not whole, and what only this machine has a use for.
_PRIVATE = re.compile(
    r"(.*/)?(\.lock(-\d+)?|analysis\.lock|.*\.part(\..+)?|\.score-\d+|\.scratch|\.lease|\.seen-\d+"
    r"|.*\.orbax-checkpoint-tmp.*)(/.*)?"
)
LEASE = re.compile(r"(.*/)?\.lease(/.*)?")
_SHOWN = 32 << 20  # bytes from which on a bar is shown
_T = TypeVar("_T")


class _Known(NamedTuple):
    """How a file was, here and in the bucket, when both were alike."""

    size: int
    modified: int  # ns
    version: str


_BEGUN = _Known(-1, -1, "")  # to be brought; they may be alike or not


class Copy:
    """A folder of a bucket and one of a disk, and when they were last alike.

    Args:
        bucket: the one.
        folder: the other; made if it is not there.
        written: what is changed in `folder` is wanted in the bucket; else `folder` only follows.
    """

    def __init__(self, bucket: Bucket, folder: pathlib.Path, *, written: bool) -> None:
        self.bucket, self.folder = bucket, folder
        self._written, self._skipped = written, _PRIVATE if written else LEASE
        folder.mkdir(parents=True, exist_ok=True)
        self._record, self._holding = beside(folder, ".json"), beside(folder, ".held")
        content: dict[str, Any] = {"owner": uuid.uuid4().hex, "files": {}, "fetching": []}
        if self._record.exists():
            content = json.loads(self._record.read_text())
        self.owner: str = content["owner"]
        self._known = {name: _Known(*fields) for name, fields in content["files"].items()}
        for name in content["fetching"]:  # by a process that was killed: no changes of ours
            (folder / name).unlink(missing_ok=True)
            self._known.pop(name, None)
        self._save()

    def changed(self) -> list[str]:
        """Files that were written or removed here since both were alike."""
        return sorted(self._changed(self._here()))

    def pull(self, there: dict[str, Item] | None = None) -> None:
        """Fetches what has changed in the bucket; what has changed here stays, if it is written.

        Args:
            there: what the bucket is to be taken to hold; by default asked for.
        """
        there = self.bucket.list() if there is None else there
        there = {n: item for n, item in _whole(there).items() if not self._skipped.fullmatch(n)}
        here = self._here()
        changed = self._changed(here)
        keep = changed if self._written else set()
        for name in (self._known.keys() | here.keys()) - there.keys() - keep:
            (self.folder / name).unlink(missing_ok=True)
            self._known.pop(name, None)
        _remove_empty(self.folder)
        wanted = {
            n: item
            for n, item in there.items()
            if n not in keep and (n in changed or self._version(n) != item.version)
        }
        room, needed = shutil.disk_usage(self.folder).free, sum(i.size for i in wanted.values())
        if needed > room:
            raise UserError(
                f"{self.bucket.address} needs {needed / 2**30:.1f} GiB on this disk, and "
                f"{self.folder} has {room / 2**30:.1f}; set DILAFF_JAX_CACHE to a folder on a "
                "larger one"
            )
        self._save(fetching=list(wanted))
        with _bar(f"from {self.bucket.address}", wanted, shown=True) as advance:

            def done(name: str) -> None:
                self._known[name] = _Known(*_state(self.folder / name), wanted[name].version)
                if self._known[name].size != wanted[name].size:
                    raise OSError(f"{self.bucket.address}/{name} changed while it was read")
                advance(name)

            try:
                self.bucket.fetch(_marks_last(wanted), self.folder, done)
            finally:
                left = [n for n, item in wanted.items() if self._version(n) != item.version]
                self._save(fetching=left)

    def push(self, *, progress: bool = False) -> None:
        """Brings to the bucket what has changed here; see `mirror` for the order.

        Args:
            progress: shows a bar where it is much.
        """
        here = self._here()
        changed = self._changed(here)
        if not changed:
            return
        new = {n: here[n] for n in here if n in changed}
        gone = [n for n in changed if n not in here]
        put: dict[str, tuple[int, int]] = {}
        for name in new.keys() - self._known.keys():
            self._known[name] = _BEGUN  # so that it is removed there, should it go here
        self._save()
        sizes = {n: Item(size, "") for n, (size, _) in new.items()}
        with _bar(f"to {self.bucket.address}", sizes, shown=progress) as advance:

            def done(name: str) -> None:
                put[name] = new[name]
                advance(name)

            try:
                held = self._hold(new)
                for names, folder in (
                    ([n for n in new if not _CHECKPOINT.match(n)], self.folder),
                    (held, self._holding),
                ):
                    rest = [n for n in names if not _is_mark(n)]
                    self.bucket.put(rest, folder, done)
                    # No mark where something was removed here meanwhile, in whatever order.
                    torn = {_folder_of(n) for n in rest if n not in put}
                    whole = [n for n in names if _is_mark(n) and _folder_of(n) not in torn]
                    self.bucket.put(whole, folder, done)
                for marks in (True, False):
                    self.bucket.remove(n for n in gone if _is_mark(n) is marks)
            finally:
                shutil.rmtree(self._holding, ignore_errors=True)
                self._note(put, gone)

    def _hold(self, names: Iterable[str]) -> list[str]:
        """Links the files of checkpoints, so that they last while they are brought.

        A run may remove a checkpoint sooner than a slow line can take it, and so every one of them.
        Returns their names, without those of checkpoints that are going already.
        """
        shutil.rmtree(self._holding, ignore_errors=True)
        held, going = [], set()
        for name in filter(_CHECKPOINT.match, names):
            link = self._holding / name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                try:
                    os.link(self.folder / name, link)
                except FileNotFoundError:
                    raise
                except OSError:  # a disk that has no links
                    shutil.copy2(self.folder / name, link)
                held.append(name)
            except FileNotFoundError:
                going.add(_folder_of(name))
        return [n for n in held if _folder_of(n) not in going]

    def set_aside(self) -> None:
        """Renames a copy whose changes nobody wants any more, and begins with an empty one."""
        aside = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
        logging.warning(
            "%s was gone on with elsewhere; what was done here and never brought there is now in "
            "%s",
            *(self.bucket.address, aside),
        )
        self.folder.rename(aside)
        self.folder.mkdir()
        self._known = {}
        self._save()

    def remove_torn(self, there: dict[str, Item]) -> None:
        """Removes checkpoints from the bucket that were not brought there whole, and are not here.

        Only for who is alone, and not those of folders below: others may be alone there.

        Args:
            there: what the bucket holds.
        """
        torn = there.keys() - _whole(there).keys()
        own = (n for n in torn if n.startswith("checkpoints/"))
        self.bucket.remove(n for n in own if not (self.folder / n).exists())

    def _changed(self, here: dict[str, tuple[int, int]]) -> set[str]:
        names = here.keys() | self._known.keys()
        return {n for n in names if n not in self._known or here.get(n) != self._known[n][:2]}

    def _version(self, name: str) -> str | None:
        return self._known[name].version if name in self._known else None

    def _note(self, put: dict[str, tuple[int, int]], gone: list[str]) -> None:
        """Remembers what was brought, and its versions there; what is not is brought again."""
        with contextlib.suppress(OSError, UserError):
            there = self.bucket.list(patience=0)
            for name in gone:
                if name not in there:
                    self._known.pop(name, None)
            for name, state in put.items():
                if name in there and there[name].size == state[0]:
                    self._known[name] = _Known(*state, there[name].version)
            self._save()

    def _here(self) -> dict[str, tuple[int, int]]:
        """{name: (size, time)}, of checkpoints first: of what they imply, nothing is older then."""
        found: dict[str, tuple[int, int]] = {}
        folders = sorted(p for p in self.folder.rglob("checkpoints") if p.is_dir())
        for folder in (*folders, self.folder):
            for parent, within, names in os.walk(folder):
                if folder == self.folder and "checkpoints" in within:
                    within.remove("checkpoints")  # those that came since are of the next time
                for path in (pathlib.Path(parent, name) for name in names):
                    name = path.relative_to(self.folder).as_posix()
                    if name in found or self._skipped.fullmatch(name) or path.is_symlink():
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = _state(path)
        return _whole(found)

    def _save(self, fetching: Iterable[str] = ()) -> None:
        content = {
            "bucket": self.bucket.address,
            "owner": self.owner,
            "files": self._known,
            "fetching": list(fetching),
        }
        files.write_text(self._record, json.dumps(content))


def beside(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    """What belongs to a copy, next to its folder."""
    return folder.with_name(folder.name + suffix)


def _state(path: pathlib.Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _folder_of(name: str) -> str:
    """The checkpoint that a file is of; of others, where it lies."""
    match = _CHECKPOINT.match(name)
    return match[0] if match else name.rpartition("/")[0]


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in _MARKS


def _marks_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=_is_mark)


def _whole(found: dict[str, _T]) -> dict[str, _T]:
    """Without the files of checkpoints that lack their mark."""
    result = {}
    for name, value in found.items():
        match = _CHECKPOINT.match(name)
        if match is None or f"{match[0]}/{_MARKS[0]}" in found:
            result[name] = value
    return result


def _remove_empty(folder: pathlib.Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(parent)


@contextlib.contextmanager
def _bar(title: str, items: dict[str, Item], shown: bool) -> Iterator[Callable[[str], object]]:
    """Yields what advances a bar of bytes by an item; no bar where they are few."""
    total = sum(item.size for item in items.values())
    hidden = not shown or total < _SHOWN
    with tqdm(
        total=total, desc=title, unit="B", unit_scale=True, disable=hidden, leave=False
    ) as bar:
        yield lambda name: bar.update(items[name].size)
