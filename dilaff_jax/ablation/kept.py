"""Results between, kept on disk with what they were made from; made anew where that differs."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"about": about, "result": result}, indent=1) + "\n")
    part.replace(path)


def arrays(path: pathlib.Path, about: Any, make: Callable[[], Mapping[str, np.ndarray]]) -> Arrays:
    """As `figures`, for named arrays in an .npz."""
    if path.exists():
        with np.load(path, allow_pickle=False) as found:
            if json.loads(str(found["about"])) == _plain(about):
                return {name: found[name] for name in found.files if name != "about"}
    made = dict(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **made)  # type: ignore[arg-type]
    part.replace(path)
    return made


def _plain(about: Any) -> Any:
    return json.loads(json.dumps(about))
