"""Where the time of a run goes: with a clock of our own, over starts, and in a real run."""

import json
import time

import jax
import pytest

from dilaff_jax.runtime import chips, goodput


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_every_second_counts_for_one_part(clock, tmp_path):
    found = goodput.Clock(tmp_path / goodput.FILE, 0, 100.0)
    clock(3)
    with found.within("compilation"):
        clock(20)
    clock(1)
    found.turn("steps")
    for _ in range(4):
        with found.within("input"):
            clock(0.5)
        clock(10)
    with found.within("checkpoints"):
        clock(2)
    clock(6)
    found.note(4)
    [line] = (tmp_path / goodput.FILE).read_text().splitlines()
    assert json.loads(line) == {
        "begin": 0,
        "step": 4,
        "seconds": {
            "start": 4.0,
            "compilation": 20.0,
            "input": 2.0,
            "steps": 46.0,
            "checkpoints": 2.0,
            "evaluation": 0.0,
        },
    }


def test_what_raises_inside_is_counted_too(clock):
    found = goodput.Clock(None, 0, 100.0)

    def fails():
        with found.within("evaluation"):
            clock(5)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert found.seconds["evaluation"] == 5


def line(begin, step, **seconds):
    return json.dumps(
        {"begin": begin, "step": step, "seconds": dict.fromkeys(goodput.PARTS, 0.0) | seconds}
    )


def test_steps_that_were_taken_again_are_lost():
    """Begun at 0, killed at 50; begun again at the checkpoint of 40, killed at 60; at 60."""
    lines = [
        line(0, 50, steps=100.0),
        line(40, 60, steps=40.0, start=10.0),
        line(60, 80, steps=50.0),
    ]
    found = goodput.summary(lines)
    assert found["starts"] == 3
    assert found["steps"] == 80
    assert found["lost"] == pytest.approx(100.0 * 10 / 50)
    assert found["seconds"]["steps"] == 190.0
    said = goodput.sentence(found)
    assert "time, 200 s: 85.0 % steps, 5.0 % starting" in said
    assert said.endswith("10.0 % lost to 2 restarts")
    assert "lost" not in goodput.sentence(goodput.summary(lines[:1]))


def test_the_share_of_the_peak_is_arithmetic_over_time(clock, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, jax.devices()[0].device_kind, chips.Chip("X", 1e9, 2e12))
    found = goodput.Clock(None, 10, 100.0)
    found.turn("steps")
    clock(8)
    with found.within("input"):
        clock(2)
    found.note(30)
    # 20 steps of 3 images and 4e11 FLOP in 10 s, of a peak of 2e12 a second.
    assert (
        found.report(3, 4e11, jax.devices()[0]) == "6.0 images/s a device, 40 % of the peak of a X"
    )
    assert goodput.utilisation(0.0, 20, 10, 2e12) is None
    assert goodput.utilisation(4e11, 20, 10, None) is None
