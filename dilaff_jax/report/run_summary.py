"""A run as one small file to keep: python -m dilaff_jax.report.run_summary WORKDIR FILE.json."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dilaff_jax import evaluate
from dilaff_jax.runtime import files
from dilaff_jax.storage import mirror


def starts(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What is known of each time that a run was started, the first one first."""
    lines = (workdir / "starts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def record(workdir: pathlib.Path) -> dict[str, Any]:
    """What a trained run was and gave.

    Returns:
        config; starts (step, time, commit, versions and hardware of each time it was started);
        curve (the lines of metrics.jsonl, without the figures of single classes); results (every
        figure of the last evaluation) with their step and table.

    Raises:
        FileNotFoundError: `workdir` holds no run with an evaluation.
    """
    results = evaluate.last_results(workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "config": json.loads((workdir / "config.json").read_text()),
        "starts": starts(workdir),
        "curve": [_main_figures(line) for line in lines],
        "step": results.step,
        "results": {name: round(value, 6) for name, value in results.scalars.items()},
        "table": results.table,
    }


def _main_figures(line: dict[str, float | None]) -> dict[str, float | None]:
    """Training's own figures, and of an evaluation those that are not of one class or dilation."""
    return {
        k: None if v is None else float(f"{v:.6g}") for k, v in line.items() if k.count("/") < 3
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=mirror.argument)
    parser.add_argument("file", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        content = record(options.workdir)
    except FileNotFoundError as error:
        sys.exit(str(error))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(files.json_text(content, indent=1) + "\n")
    print(f"{options.file}: step {content['step']} of {options.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
