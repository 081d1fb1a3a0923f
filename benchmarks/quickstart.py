"""What the quickstart reaches, and in what time: python -m benchmarks.quickstart [--seeds 0 1 2].

Runs `launch/quickstart.sh` once for each seed in folders of its own and writes
results/quickstart.json. About five minutes a seed on two CPU cores; nothing else should run beside.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import timing
from dilaff_jax import evaluate
from dilaff_jax.report import compare_runs, run_summary

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a first result has to show: per cent, and seconds.
BARS = {
    "baseline_miou": 60.0,
    "baseline_worst_class": 25.0,
    "propagation_adds_miou": 5.0,
    "propagation_adds_boundary_f": 10.0,
}
MOST = {"training_seconds": 300.0, "seconds": 420.0}


def run(seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """One quickstart: figures in per cent, seconds of the whole and of its two trainings."""
    environment = os.environ | {"SEED": str(seed), "WORKDIR": str(workdir)}
    start = time.monotonic()
    subprocess.run(["bash", str(ROOT / "launch/quickstart.sh")], env=environment, check=True)
    seconds = time.monotonic() - start
    scalars = {a: evaluate.last_results(workdir / a).scalars for a in ("baseline", "joint")}
    plain, joint = scalars["baseline"], scalars["joint"]
    classes = [v for k, v in plain.items() if k.startswith("plain/iou/")]
    gains = {
        f"propagation_adds_{name}": 100 * (joint[f"refined/{name}"] - joint[f"plain/{name}"])
        for name in ("miou", "boundary_f")
    }
    rows = {
        f"{arm}_{variant}": {
            name: round(100 * found[f"{variant}/{name}"], 2) for name in compare_runs.ROWS
        }
        | {
            k.removeprefix(f"{variant}/iou/"): round(100 * v, 2)
            for k, v in found.items()
            if k.startswith(f"{variant}/iou/")
        }
        for arm, variant, found in (
            ("baseline", "plain", plain),
            ("joint", "plain", joint),
            ("joint", "refined", joint),
        )
    }
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "training_seconds": round(sum(_training_seconds(workdir / a) for a in scalars), 1),
        "baseline_miou": round(100 * plain["plain/miou"], 2),
        "baseline_worst_class": round(100 * min(classes), 2),
        **{name: round(value, 2) for name, value in gains.items()},
        "figures": rows,
    }


def _training_seconds(workdir: pathlib.Path) -> float:
    """From the start of a training to its last file: compilation and evaluation are in it."""
    begun = run_summary.starts(workdir)[0]["time"]
    ended = (workdir / "evaluation").rglob("results.json")
    finished = max(file.stat().st_mtime for file in ended)
    return finished - datetime.datetime.fromisoformat(begun).timestamp()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the seeds, writes results/quickstart.json, says whether every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(seed, pathlib.Path(folder) / str(seed)) for seed in options.seeds]
    missed = [
        f"seed {row['seed']}: {name} {row[name]}"
        for row in rows
        for name, bar in (BARS | MOST).items()
        if (row[name] < bar if name in BARS else row[name] > bar)
    ]
    content: dict[str, Any] = {"provenance": timing.provenance(), "at_least": BARS, "at_most": MOST}
    content |= {"met": not missed, "runs": rows}
    print("written:", timing.write("quickstart", content))
    print("every bar is met" if not missed else "NOT met: " + "; ".join(missed))


if __name__ == "__main__":
    main()
