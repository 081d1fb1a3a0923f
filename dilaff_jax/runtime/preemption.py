"""Requests to stop: SIGTERM as schedulers send it, before which what is done is saved; Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from dilaff_jax.runtime import interrupts


class Preempted(Exception):  # noqa: N818 - it is no error
    """The process was asked to stop, and its state is saved."""


class Stop(threading.Event):
    """Set by SIGTERM; `interrupted` says that Ctrl-C was pressed."""

    interrupted = False


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turns SIGTERM into an event, so that the step under way is finished and saved."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    interrupt = signal.getsignal(signal.SIGINT)
    own: dict[int, Callable[..., object]] = {}
    if callable(interrupt):

        def note(*about: Any) -> None:
            try:
                interrupt(*about)
            except KeyboardInterrupt:  # not where it is to come once more
                stop.interrupted = True
                raise

        own[signal.SIGINT] = note
    # With several processes JAX's own service listens, so that all stop at the same step.
    if jax.process_count() == 1:
        own[signal.SIGTERM] = lambda *_: stop.set()
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # Asked to stop when the run ended anyway: whoever called it has to know.
    terminate = before.get(signal.SIGTERM)
    if stop.is_set() and callable(terminate):
        terminate(signal.SIGTERM, None)


def all_agreed(stop: Stop, step: int) -> bool:
    """Whether all processes are to stop after this step.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and Python dropped it (see `interrupts`), as in a
            notebook.
    """
    if stop.interrupted:
        raise KeyboardInterrupt
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return stop.is_set()


@contextlib.contextmanager
def stopping_cleanly(workdir: str | os.PathLike) -> Iterator[Callable[[bool], None]]:
    """Makes a request to stop an exception; the value says whether a run trains.

    A run that trains saves its step first, by `stop_signal`. Until it listens, threads of its data
    and checkpoints are being started and must not be torn down midway: the request is made again
    every second until it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: None
        return
    training, asked, again = False, False, None
    message = f"asked to stop: what is done is kept in {workdir}; run again to go on"

    def tell(now: bool) -> None:
        nonlocal training
        training = now
        if asked and not now:
            raise Preempted(message)

    def stop(*_: object) -> None:
        nonlocal asked, again
        asked = True
        if not training:
            raise Preempted(message)
        again = interrupts.later(signal.SIGTERM, 1.0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield tell
    finally:
        if again is not None:
            again.cancel()
        signal.signal(signal.SIGTERM, before)
