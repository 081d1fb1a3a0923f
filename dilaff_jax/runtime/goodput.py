"""Where the time of a run goes: steps, compilation, input, checkpoints, evaluation, restarts.

Each start of a run adds a line to WORKDIR/goodput.jsonl and keeps it up to date: the step at which
it began, the last one, and seconds by part. (Not to metrics.jsonl, which is the same to the bit
however often a run was stopped.) `summary` adds up the starts.
"""

import contextlib
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dilaff_jax.runtime import chips, files

FILE = "goodput.jsonl"
PARTS = ("start", "compilation", "input", "steps", "checkpoints", "evaluation")
_WORDS = {"start": "starting", "compilation": "compiling", "input": "waiting for input"}


class Clock:
    """Of one start: at any time it counts for one part.

    Args:
        file: to note it in; None for a process that leaves that to another.
        begin: the step at which the run goes on.
        since: `time.perf_counter()` when it was started.
    """

    def __init__(self, file: pathlib.Path | None, begin: int, since: float) -> None:
        self._file, self._begin, self._since, self._part = file, begin, since, "start"
        self._step = begin
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._earlier = [] if file is None or not file.exists() else file.read_text().splitlines()

    def turn(self, part: str) -> None:
        """From now on it counts for this part."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Inside, it counts for this part; then for the one before."""
        before = self._part
        self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def worked(self) -> float:
        """Seconds in steps and in waiting for their input so far."""
        self.turn(self._part)
        return self.seconds["steps"] + self.seconds["input"]

    def note(self, step: int) -> None:
        """Writes what there is so far; `step` is the last one taken."""
        self.turn(self._part)
        self._step = step
        if self._file is not None:
            files.write_text(self._file, "\n".join(self._lines()) + "\n")

    def report(self, images: float, flops: float, device: jax.Device) -> str:
        """Where the time went over all starts, and how fast the steps of this one were.

        Args:
            images: of a step, on each device.
            flops: of a step, on each device; recomputation included, bodies of loops once.
            device: of which the peak is known, or not.
        """
        seconds = self.worked()
        lines = [] if self._file is None else [sentence(summary(self._lines()))]
        steps = self._step - self._begin
        if steps > 0:
            chip = chips.of(device)
            share = utilisation(flops, steps, seconds, chip.flops)
            used = "" if share is None else f", {100 * share:.0f} % of the peak of a {chip.name}"
            lines.append(f"{steps * images / seconds:.1f} images/s a device{used}")
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        seconds = {part: round(value, 3) for part, value in self.seconds.items()}
        line = {"begin": self._begin, "step": self._step, "seconds": seconds}
        return [*self._earlier, json.dumps(line)]


def summary(lines: Sequence[str]) -> dict[str, Any]:
    """Adds up the lines of a goodput.jsonl.

    Returns:
        starts: how many; seconds: by part; lost: seconds in steps that were taken again by the next
        start (what was lost after a start's last note is not known); steps: that count, taken once.
    """
    starts = [json.loads(line) for line in lines]
    seconds = {part: sum(start["seconds"][part] for start in starts) for part in PARTS}
    lost = 0.0
    for start, after in itertools.pairwise(starts):
        taken = start["step"] - start["begin"]
        again = max(0, start["step"] - max(after["begin"], start["begin"]))
        lost += start["seconds"]["steps"] * again / taken if taken else 0.0
    return {
        "starts": len(starts),
        "seconds": seconds,
        "lost": lost,
        "steps": starts[-1]["step"] if starts else 0,
    }


def sentence(found: dict[str, Any]) -> str:
    """A summary in one line, per cent of the whole time."""
    total = max(sum(found["seconds"].values()), 1e-9)
    shares = {part: 100 * value / total for part, value in found["seconds"].items()}
    shares["steps"] -= 100 * found["lost"] / total
    parts = [f"{shares[p]:.1f} % {_WORDS.get(p, p)}" for p in PARTS if p != "steps"]
    if found["starts"] > 1:
        again = found["starts"] - 1
        restarts = f"{again} restart{'s' if again > 1 else ''}"
        parts.append(f"{100 * found['lost'] / total:.1f} % lost to {restarts}")
    return f"time, {total:.0f} s: {shares['steps']:.1f} % steps, {', '.join(parts)}"


def utilisation(
    flops: float | None, steps: int, seconds: float, peak: float | None
) -> float | None:
    """Share of a device's peak that a run's arithmetic came to; None where one is not known.

    flops·steps / seconds / peak, with the FLOPs of the compiled step on one device (recomputation
    included, bodies of loops once) and the peak of bfloat16.
    """
    if not flops or not peak or not steps or seconds <= 0:
        return None
    return flops * steps / seconds / peak
