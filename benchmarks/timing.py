"""Where the benchmarks write, and the package's timing under one name with it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dilaff_jax.runtime.cost import PAUSE_SECONDS, interleaved, median
from dilaff_jax.runtime.provenance import provenance

__all__ = ["PAUSE_SECONDS", "RESULTS", "interleaved", "median", "provenance", "write"]

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"


def write(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Writes results/`name`.json and returns its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
