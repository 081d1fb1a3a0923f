"""Interleaved timing, and the record of where and with what a number was measured."""

import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import tqdm

PAUSE_SECONDS = 0.3


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], repeats: int = 7, title: str = ""
) -> dict[str, list[float]]:
    """Runs every contender once to warm up, then all in turn `repeats` times; seconds of each run.

    Interleaved, so that a slow spell of a shared machine falls on all. A pause before each lets the
    threads of the library that ran before it stop spinning (OpenMP's wait actively for 0.2 s). A
    contender must return only when its work is done (`jax.block_until_ready`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm.tqdm(total=(repeats + 1) * len(contenders), desc=title, leave=False) as bar:
        for repeat in range(repeats + 1):
            for name, run in contenders.items():
                bar.set_postfix_str(name)
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter()
                run()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def median(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median seconds of each contender."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


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


def _commit() -> str:
    """Of the checkout this package lies in; "" where it is none (installed, or no git)."""
    root = pathlib.Path(__file__).resolve().parents[1]
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
