"""What a person sees and what a program reads back: metrics.jsonl, trackers, progress, tables.

metrics.jsonl holds only what a resumed run reproduces to the bit; times go to the trackers and the
progress bar. Only process 0 writes.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from clu import parameter_overview
from tqdm import tqdm

from dilaff_jax.runtime import files, goodput, trackers


class Reporter:
    """Writes a run's numbers and pictures under `workdir`.

    Args:
        workdir: of the run.
        num_steps: of the whole run, for the progress bar.
        step: at which the run goes on; later lines of metrics.jsonl are dropped, they will be
            written again.
        clock: of this start of the run.
        evaluated: whether the evaluation of that step, if it has one, came to its end; else what it
            left is dropped, too.
        begin: what opens the trackers, on process 0 alone.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        num_steps: int,
        step: int,
        clock: goodput.Clock,
        evaluated: bool = True,
        begin: Callable[[], Sequence[trackers.Tracker]] = tuple,
    ) -> None:
        self._active = jax.process_index() == 0
        self._clock, self._rows, self._worked = clock, 0, 0.0
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        keep_until(self._path, step, evaluated)
        self._lines = self._path.open("a")
        self._trackers = begin()
        self._bar = tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, rows: int) -> None:
        """Counts one step of `rows` images."""
        self._rows += rows
        if self._active:
            self._bar.update()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line to metrics.jsonl, and the same to the trackers."""
        if not self._active:
            return
        with self._naming():
            self._lines.write(files.json_text({"step": step, **values}) + "\n")
            self._lines.flush()
        for tracker in self._trackers:
            tracker.scalars(step, values)
        names = [n for n in ("train/loss", "train/miou") if n in values]
        shown = {n.split("/")[-1]: f"{values[n]:.3f}" for n in names}
        if shown:
            self._bar.set_postfix(shown | {"images/s": f"{self.throughput(step):.1f}"})

    def throughput(self, step: int) -> float:
        """Images a second of steps and input since the last call; to the trackers."""
        worked = self._clock.worked()
        rate = self._rows / max(worked - self._worked, 1e-9)
        self._rows, self._worked = 0, worked
        for tracker in self._trackers if self._active else ():
            tracker.scalars(step, {"time/images_per_second": rate})
        return rate

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds RGB uint8 pictures `[H, W, 3]` to the trackers."""
        for tracker in self._trackers if self._active and pictures else ():
            tracker.pictures(step, pictures)

    def say(self, text: str) -> None:
        """Prints above the progress bar."""
        if self._active:
            tqdm.write(text)

    def sync(self) -> None:
        """Returns when metrics.jsonl is on disk; a checkpoint must not be newer than its lines."""
        if self._active:
            with self._naming():
                self._lines.flush()
                os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Closes all files."""
        if self._active:
            with self._naming(), contextlib.ExitStack() as open_files:
                for one in (self._lines, *self._trackers, self._bar):
                    open_files.callback(one.close)
                self.sync()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Says where, which a full disk does not."""
        try:
            yield
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._path.parent)) from e


def keep_until(path: pathlib.Path, step: int, evaluated: bool = True) -> None:
    """Drops the lines of a metrics.jsonl later than `step`, and a last line that is torn.

    Where that step's evaluation is still to come, also the lines of one that was cut off.

    Atomic: at no time is there less than what is kept.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            content = json.loads(line)
            unfinished = not evaluated and any(key.startswith("eval/") for key in content)
            if content["step"] <= step and not (unfinished and content["step"] == step):
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break  # torn by a kill while it was written; nothing follows it
    files.write_text(path, "".join(kept))


def parameter_table(params: Any) -> str:
    """Names, shapes and sizes of all parameters, and their number."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def memory_line(compiled: Any) -> str:
    """What a compiled program needs on each device, as XLA states it."""
    stats = compiled.memory_analysis()
    if stats is None:
        return "memory a device: this platform does not say"
    # What the outputs share with donated arguments is counted once.
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )
    return (
        f"memory a device: {total / 2**20:,.0f} MiB (state and batch "
        f"{stats.argument_size_in_bytes / 2**20:,.0f}, temporaries "
        f"{stats.temp_size_in_bytes / 2**20:,.0f})"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table with numbers to the right, as plain text."""
    result = rich.table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left")
    for row in rows:
        result.add_row(*row)
    console = rich.console.Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(result)
    return captured.get()
