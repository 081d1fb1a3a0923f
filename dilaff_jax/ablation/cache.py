"""Results between, kept on disk with what they were made from; made anew where that differs."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dilaff_jax.runtime import files

Arrays = dict[str, np.ndarray]


def figures(path: pathlib.Path, about: Any, make: Callable[[], Any]) -> Any:
    """Returns what `make` returned when `path` (JSON) was written about the same, else makes it."""
    known = read(path, about)
    if known is None:
        known = make()
        write(path, about, known)
    return known


def read(path: pathlib.Path, about: Any) -> Any:
    """What `path` holds about this, or None."""
    if path.exists():
        content = json.loads(path.read_text())
        if content["about"] == _plain(about):
            return content["result"]
    return None


def write(path: pathlib.Path, about: Any, result: Any) -> None:
    """Replaces `path` at once."""
    files.write_text(path, json.dumps({"about": about, "result": result}, indent=1) + "\n")


def publish(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a final result as JSON, without white space, and says where."""
    text = json.dumps(result, indent=None, separators=(",", ":"), allow_nan=False)
    files.write_text(path, text + "\n")
    print(f"written: {path}")


def arrays(path: pathlib.Path, about: Any, make: Callable[[], Mapping[str, np.ndarray]]) -> Arrays:
    """As `figures`, for named arrays in an .npz."""
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(str(stored["about"])) == _plain(about):
                return {name: stored[name] for name in stored.files if name != "about"}
    made = dict(make())
    with files.replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **made)  # type: ignore[arg-type]
    return made


def _plain(about: Any) -> Any:
    return json.loads(json.dumps(about))
