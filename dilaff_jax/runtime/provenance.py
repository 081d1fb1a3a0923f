"""The record of where and with what a number was made."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any


def provenance(*packages: str) -> dict[str, Any]:
    """Says what ran: commit, command-relevant versions, processor, cores, accelerator."""
    import jax

    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", *packages)},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [d.device_kind for d in jax.devices()],
    }


def note_start(workdir: pathlib.Path, begin: int, changed: Sequence[str]) -> None:
    """Adds to starts.jsonl what runs from here on: step, commit, versions, hardware, time.

    Args:
        workdir: of the run; process 0 writes.
        begin: the step at which it goes on.
        changed: what is not as it was before `begin`.
    """
    import jax

    if jax.process_index() == 0:
        about = {
            "step": begin,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processes": jax.process_count(),
            **({"changed": list(changed)} if changed else {}),
            **provenance("jaxlib", "flax", "optax", "grain", "numpy"),
        }
        with (workdir / "starts.jsonl").open("a") as file:
            file.write(json.dumps(about) + "\n")


def _commit() -> str:
    """Of the checkout this package is in; "" where it is none (installed, or no git)."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "dilaff_jax"], capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        return ""
    return commit.strip() + (" with local changes" if changed.strip() else "")


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
