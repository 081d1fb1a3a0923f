"""Requests to stop, SIGTERM as schedulers send it: what is done is saved first."""

import contextlib
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818 - it is no error
    """The process was asked to stop, and its state is saved."""


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Turns SIGTERM into an event, so that the step under way is finished and saved."""
    stop = threading.Event()
    # With several processes JAX's own service listens, so that all stop at the same step.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
    # Asked to stop when the run ended anyway: whoever called it has to know.
    if stop.is_set() and callable(before):
        before(signal.SIGTERM, None)


def all_agreed(stop: threading.Event, step: int) -> bool:
    """Whether all processes are to stop after this step."""
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return stop.is_set()


@contextlib.contextmanager
def stopping_cleanly(workdir: pathlib.Path) -> Iterator[Callable[[bool], None]]:
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
        again = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield tell
    finally:
        if again is not None:
            again.cancel()
        signal.signal(signal.SIGTERM, before)
