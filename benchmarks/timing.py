"""Where the benchmarks write, and the package's timing under one name with it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from dilaff_jax.runtime.cost import PAUSE_SECONDS, interleaved, median
from dilaff_jax.runtime.provenance import provenance

__all__ = [
    "PAUSE_SECONDS",
    "RESULTS",
    "interleaved",
    "median",
    "print_steps",
    "provenance",
    "write",
]

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"


def print_steps(title: str, medians: Mapping[str, float], images: int, reference: str) -> None:
    """A table of training steps of so many images: milliseconds, images/s, time / reference's."""
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("", "median ms", "images/s", f"/ {reference}"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in medians.items():
        ratio = value / medians[reference]
        table.add_row(name, f"{1e3 * value:.0f}", f"{images / value:.2f}", f"{ratio:.2f}")
    rich.console.Console().print(table)


def write(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Writes results/`name`.json and returns its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
