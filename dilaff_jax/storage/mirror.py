"""A copy on this machine's disk of a folder in a bucket: what runs works on it.

A disk has what a bucket lacks: appending, renaming, locks. So a workdir gs://... is a copy of it,
fetched first, written to as any folder, and brought to the bucket every few seconds and at the end,
by a thread that the training does not wait for. While a bucket fails nothing is lost: it is all in
the copy, and the same command on the same machine goes on from there. What is in the bucket can be
gone on from at any moment, on any machine:

    A checkpoint, a data set: the file by which it is recognised is brought last and removed first.
    Checkpoints are looked for before all else is read, so that metrics.jsonl is never older.
    Who trains, prepares or analyses holds a lease (`storage.lease`).
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import signal
import threading
from collections.abc import Iterator

import numpy as np
from absl import logging

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import files, locks
from dilaff_jax.runtime.locks import Taken
from dilaff_jax.storage import bucket as bucket_lib
from dilaff_jax.storage.bucket import Bucket
from dilaff_jax.storage.copy import LEASE, Copy, beside
from dilaff_jax.storage.lease import Lease

# Seconds between two looks at what has changed; our choice.
EVERY = 15.0


class Nothing(UserError):  # noqa: N818 - it says what there is
    """A bucket holds nothing of that name."""


def cache() -> pathlib.Path:
    """Where copies are: $DILAFF_JAX_CACHE, else dilaff_jax in the user's folder for caches."""
    chosen = os.environ.get("DILAFF_JAX_CACHE")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dilaff_jax"


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path on a disk, to be read: as `files.local`; of a bucket, a copy that is fetched now.

    Args:
        path: a folder or a file.
        what: the name of the option, for messages.

    Raises:
        UserError: there is nothing, no access, or too little room.
        OSError: the bucket fails for minutes.
    """
    if not bucket_lib.is_address(path):
        return files.local(path, what)
    address = os.fspath(path).rstrip("/")
    found = {n: i for n, i in Bucket(address).list().items() if not LEASE.fullmatch(n)}
    if not found:
        raise Nothing(f"{what}: there is nothing at {address}")
    name = address.rpartition("/")[2]
    whole = Bucket(address.rpartition("/")[0] if "" in found else address)
    folder = _folder(address, "read")
    with locks.held(beside(folder, ".lock"), wait=True):  # once a machine, not once a process
        copy = Copy(whole, folder, written=False)
        if "" in found:
            copy.pull({name: found[""]})
            return folder / name
        copy.pull(found)
    return folder


def argument(text: str) -> pathlib.Path:
    """`local`, as the type of an argument of `argparse`."""
    try:
        return local(text, "the path")
    except (UserError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def some(path: str | os.PathLike, what: str, names: re.Pattern[str]) -> pathlib.Path:
    """As `local`, of a bucket only what is asked for; an empty folder where it has none of it.

    Args:
        path: a folder.
        what: the name of the option, for messages.
        names: of the files of a bucket that are fetched, below `path`.
    """
    if not bucket_lib.is_address(path):
        return files.local(path, what)
    bucket = Bucket(os.fspath(path))
    folder = _folder(bucket.address, "some")
    with locks.held(beside(folder, ".lock"), wait=True):
        found = {n: item for n, item in bucket.list().items() if names.fullmatch(n)}
        Copy(bucket, folder, written=False).pull(found)
    return folder


def below(path: str | os.PathLike, *names: str) -> str | pathlib.Path:
    """A path below another, on a disk or in a bucket."""
    if bucket_lib.is_address(path):
        return "/".join((os.fspath(path).rstrip("/"), *names))
    return pathlib.Path(path).expanduser().joinpath(*names)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A small file, written at once: replaced as a whole, on a disk or in a bucket.

    Not for what a copy is written in: that would bring what it has.
    """
    if bucket_lib.is_address(path):
        folder, _, name = os.fspath(path).rpartition("/")
        Bucket(folder).write(name, text.encode())
    else:
        files.write_text(pathlib.Path(path), text)


def wait(path: str | os.PathLike) -> None:
    """Returns once no process of any machine is alone in a folder of a bucket."""
    bucket = Bucket(os.fspath(path))
    folder = _folder(bucket.address, "work")
    with locks.held(beside(folder, ".lock"), wait=True):
        owner = Copy(bucket, folder, written=True).owner
    Lease(bucket, owner).wait()


@contextlib.contextmanager
def written(
    path: str | os.PathLike,
    what: str,
    *,
    alone: bool = False,
    wait: bool = False,
    each: bool = False,
    kind: str = "work",
) -> Iterator[pathlib.Path]:
    """A folder to be written to; of a bucket, a copy that is brought there while this lasts.

    Each process of a run has a copy of its own.

    Args:
        path: of the folder.
        what: the name of the option, for messages.
        alone: no other machine may write there; on a disk, whoever writes sees to that.
        wait: for as long as another process is alone there.
        each: every process brings what it has, and not process 0 alone.
        kind: copies of different kinds are used side by side.

    Raises:
        UserError: no access, too little room, no library for such an address.
        Taken: another machine writes there, or has taken over.
        OSError: the bucket fails for minutes: all there is, is in the copy, and goes there when the
            same is done again.
    """
    if not bucket_lib.is_address(path):
        yield files.local(path, what)
        return
    import jax  # which preparing a data set on a disk does without

    address, index = os.fspath(path), jax.process_index()
    bucket = Bucket(address)
    folder = _folder(bucket.address, f"{kind}{index or ''}")
    with locks.held(beside(folder, ".lock"), wait=wait) as mine:
        if not mine:
            raise Taken(f"{path}: another process of this machine works there; wait for it")
        with _Session(bucket, folder, alone, each, wait) as session:
            if index == 0:
                print(f"{path}: worked on in {folder}", flush=True)
            if jax.config.values["jax_compilation_cache_dir"] is None:
                cached = str(folder / "compilation_cache")
                jax.config.update("jax_compilation_cache_dir", cached)
            yield folder
            session.succeeded = True


class _Session:
    """Writing to a copy: fetches first, brings back in the background and at the end."""

    def __init__(
        self, bucket: Bucket, folder: pathlib.Path, alone: bool, each: bool, wait: bool = False
    ) -> None:
        import jax

        self._first, self._many = jax.process_index() == 0, jax.process_count() > 1
        self._brings = self._first or each
        self._copy, self._alone = Copy(bucket, folder, written=self._brings), alone
        self._wait = wait
        self._lease = Lease(bucket, self._copy.owner)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._bring, name="bucket", daemon=True)
        self.succeeded = False

    def __enter__(self) -> "_Session":
        from jax.experimental import multihost_utils

        failure: Exception | None = None
        if self._first:
            try:
                self._begin()
            except Exception as error:  # the others must hear of it before it is raised
                failure = error
        if self._many:
            ready = multihost_utils.broadcast_one_to_all(np.asarray(failure is None))
            if not ready and failure is None:
                raise Taken(
                    f"{self._copy.bucket.address}: process 0 cannot work there; it says why"
                )
        if failure is not None:
            raise failure
        if not self._first:
            self._copy.pull()
        if self._many:
            multihost_utils.sync_global_devices("every process has its copy of the bucket")
        if self._brings:
            self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        if not self._brings:
            return
        self._ended.set()
        self._thread.join()
        try:
            self._lease.check()
            self._copy.push(progress=True)
            if self._alone:
                self._lease.release()
        except (OSError, UserError) as error:
            kept = f"{error}. All of it is in {self._copy.folder}"
            if self.succeeded:
                again = "; the same command on this machine brings it there"
                raise type(error)(kept + ("" if isinstance(error, Taken) else again)) from error
            logging.error("%s", kept)  # what ended the work is raised already
        finally:
            self._lease.stop()

    def _begin(self) -> None:
        copy = self._copy
        if not self._alone:
            copy.pull()
            return
        before = self._lease.take(self._stop, wait=self._wait)
        try:
            if before != copy.owner and copy.changed():
                copy.set_aside()
            there = copy.bucket.list()
            copy.pull(there)
            copy.remove_torn(there)
        except BaseException:
            with contextlib.suppress(OSError, UserError):
                self._lease.release()
            raise

    def _bring(self) -> None:
        failed = False
        while not self._ended.wait(EVERY):
            try:
                self._lease.check()
                self._copy.push()
                failed = False
            except Taken:
                return
            except Exception as error:  # it is all here; the end says so if it must
                if not failed:
                    logging.warning("%s; going on, and trying again", error)
                failed = True

    def _stop(self) -> None:
        """The work is not ours any more: as if the machine asked to stop."""
        os.kill(os.getpid(), signal.SIGTERM)


def _folder(address: str, kind: str) -> pathlib.Path:
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return cache() / "buckets" / f"{address.rpartition('/')[2]}-{digest}" / kind
