"""One table of several runs: python -m dilaff_jax.report.compare_runs WORKDIR [WORKDIR ...]."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dilaff_jax import evaluate
from dilaff_jax.runtime import reporting

ROWS = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "boundary_f": "boundary F",
}


def table(workdirs: Sequence[pathlib.Path]) -> str:
    """Lays out the last evaluation of each run, plain and refined, in per cent.

    Raises:
        FileNotFoundError: a run has no evaluation.
    """
    columns: dict[str, dict[str, float]] = {}
    for workdir in workdirs:
        results = evaluate.last_results(workdir)
        for variant in (evaluate.PLAIN, evaluate.REFINED):
            figures = {
                name: results.scalars[f"{variant}/{name}"]
                for name in ROWS
                if f"{variant}/{name}" in results.scalars
            }
            if figures:
                columns[f"{workdir.name}, {variant}"] = figures
    rows = [
        [title, *(f"{100 * c[name]:.2f}" if name in c else "-" for c in columns.values())]
        for name, title in ROWS.items()
    ]
    return reporting.table("last evaluation, per cent", ["", *columns], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR")
    workdirs = parser.parse_args(arguments).workdirs
    try:
        print(table(workdirs))
        for workdir in workdirs:
            step = evaluate.last_results(workdir).step
            print(f"pictures: {evaluate.result_folder(workdir, step) / 'pictures'}")
    except FileNotFoundError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
