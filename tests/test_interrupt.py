"""Ctrl-C at any moment: it is raised, and nothing is left behind that waits for ever."""

import gc
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from dilaff_jax.configs import default
from dilaff_jax.runtime import interrupts, preemption
from dilaff_jax.runtime.checkpoint import Checkpoints
from dilaff_jax.runtime.parallel import Devices

MOMENTS = 12


class Position:
    """A stand-in for an iterator over data."""

    def get_state(self):
        return {"step": 1}


def pressed_while_garbage_is_collected():
    """What is raised in there is printed and dropped."""
    seen = []

    def pressed(phase, about):
        if phase == "start" and not seen:
            seen.append(phase)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(pressed)
    try:
        gc.collect()
        sum(range(10))
    finally:
        gc.callbacks.remove(pressed)


@pytest.fixture
def listening():
    """Ctrl-C as in a terminal; what runs in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def calls(act, at=None):
    """The functions that `act` calls, in number; Ctrl-C is pressed within the one of number `at`."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event == "call"
        if event == "call" and number == at:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return number


def test_it_leaves_no_thread_of_a_checkpoint_behind(tmp_path, listening):
    """The threads of a save wait for one another, half an hour where one of them is not begun."""
    config = default.get_config()
    config.parallel.update({"devices": 1, "mode": "shard_map"})
    devices = Devices.of(config.parallel)
    state = {"kernel": jnp.ones((30, 40)), "bias": jnp.arange(3.0)}
    before = set(threading.enumerate())

    def saved(folder):
        folder.mkdir()
        return Checkpoints(folder, devices, keep_latest=1)

    for name in ("first", "whole"):  # the first imports
        whole = saved(tmp_path / name)
        number = calls(lambda of=whole: of.save(1, state, Position()))
        whole.close()
    assert number > 1000
    for moment in range(MOMENTS):
        checkpoints = saved(tmp_path / str(moment))
        with pytest.raises(KeyboardInterrupt):
            calls(
                lambda of=checkpoints: of.save(1, state, Position()),
                at=1 + number * (2 * moment + 1) // (2 * MOMENTS),
            )
        checkpoints.close()
    deadline = time.monotonic() + 20  # those that end do so in a moment
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_what_is_unbroken_comes_to_its_end_unless_it_is_pressed_again(listening):
    done = []

    @interrupts.unbroken()
    def press(times):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append(f"the rest after {times}")
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as raised:
        press(1)
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):
        press(2)
    with pytest.raises(ZeroDivisionError):
        press(0)
    assert done == ["the rest after 1", "the rest after 0"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_is_told_to_ignore_it_ignores_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.stop_signal() as stop, interrupts.unbroken():
            signal.raise_signal(signal.SIGINT)
        assert not stop.interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_that_python_drops_is_raised_at_the_next_step(listening, monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    with preemption.stop_signal() as stop:
        assert not preemption.all_agreed(stop, 1)
        pressed_while_garbage_is_collected()
        assert [d.exc_type for d in dropped] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            preemption.all_agreed(stop, 2)
    assert jax.process_count() == 1


class PressedAtItsEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_one_that_is_to_come_once_more_is_raised_once(listening, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    interrupts.listen()
    seen = []

    def act():  # a busy machine may come to the second one sooner
        pressed_while_garbage_is_collected()
        seen.append(stop.interrupted)
        time.sleep(5)

    with preemption.stop_signal() as stop:
        with pytest.raises(KeyboardInterrupt):
            act()
        assert True not in seen
        assert stop.interrupted


@pytest.mark.parametrize("press", [pressed_while_garbage_is_collected, PressedAtItsEnd])
def test_the_command_hears_it_where_python_would_drop_it(press, listening, monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    interrupts.listen()

    def act():
        press()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        act()
    assert not dropped


def test_the_command_ignores_it_where_it_is_told_to(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_is_one_line_and_other_errors_have_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    interrupts.listen()
    for error in (KeyboardInterrupt(), ZeroDivisionError("ours")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err.splitlines() == [
        "KeyboardInterrupt: what is saved stays, and the same command goes on",
        "ZeroDivisionError: ours",
    ]
