"""Locks that several processes respect: who prepares, trains or analyses in a folder is alone."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from absl import logging

from dilaff_jax.errors import UserError


class Taken(UserError):  # noqa: N818 - nothing is wrong but the time
    """Another process, of this machine or of another, works there or has taken over."""


@contextlib.contextmanager
def held(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` while it lasts; yields whether it could be had.

    The system lets go of it when the process ends, however it ends. It works between machines where
    their shared disk has locks, as NFS does; a disk without any is warned about, and nobody is
    kept out.

    Args:
        path: made if it is not there, and left.
        wait: until another process lets go; else False is yielded at once.

    Raises:
        OSError: `path` cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            logging.warning("%s: no locks on this disk (%s); run nothing twice there", path, error)
        yield True
