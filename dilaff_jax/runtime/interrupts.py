"""Ctrl-C: heard wherever it comes, said in one line, never in the middle of what must not break."""

import contextlib
import gc
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any


def listen() -> None:
    """Makes Ctrl-C an exception wherever it comes, and a line in place of its traceback.

    Not where who started this process told it to ignore Ctrl-C, as shells do in the background.
    """
    sys.excepthook = _say
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def later(number: int, seconds: float) -> threading.Timer:
    """Sends this process a signal in a while, unless the timer is cancelled."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C within is raised at the end; one more is raised at once.

    For what waits for ever when it is left in the middle, as threads of Orbax do for one another.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[Any] = []

    def note(*about: Any) -> None:
        asked.append(about)
        if len(asked) > 1:
            before(*about)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(asked) == 1:
            before(*asked[0])


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt, later where Python would drop it.

    It drops what is raised in `__del__` and in what it calls when it collects garbage, as JAX lets
    it: with so many objects a Ctrl-C comes there not seldom.
    """
    calls = {getattr(called, "__code__", None) for called in gc.callbacks}
    while frame is not None:
        if frame.f_code in calls or frame.f_code.co_name == "__del__":
            later(number, 0.05)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _say(kind: type[BaseException], *about: Any) -> None:
    """In place of a traceback; Python then ends as by the signal, as a shell expects."""
    if issubclass(kind, KeyboardInterrupt):
        says = "KeyboardInterrupt: what is saved stays, and the same command goes on"
        print(says, file=sys.stderr)
    else:
        sys.__excepthook__(kind, *about)
