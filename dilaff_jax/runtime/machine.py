"""This machine: its memory, and processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def memory() -> int:
    """Bytes that it has in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: ends it when the one that did is gone.

    Also if that was killed without a word, as by a scheduler.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
