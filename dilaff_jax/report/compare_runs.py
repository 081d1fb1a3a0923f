"""One table of several runs: python -m dilaff_jax.report.compare_runs WORKDIR [WORKDIR ...].

With `--picture FILE.png` also one picture: the first images of the last run's evaluation, what it
says of them, refined where it refines.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import cv2
import numpy as np

from dilaff_jax import evaluate
from dilaff_jax.data import images
from dilaff_jax.runtime import reporting
from dilaff_jax.storage import mirror

# Images in the picture, and the least width of it in pixels, up to which small ones are enlarged.
_SHOWN, _WIDTH = 4, 1200

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


def picture(workdir: pathlib.Path) -> np.ndarray:
    """The pictures of a run's last evaluation, the first by name, one under the other.

    Returns:
        RGB uint8 `[H, W, 3]`.

    Raises:
        FileNotFoundError: there is no evaluation, or none with pictures.
    """
    folder = evaluate.result_folder(workdir, evaluate.last_results(workdir).step) / "pictures"
    files = sorted(folder.glob("*.png"))[:_SHOWN]
    if not files:
        raise FileNotFoundError(
            f"no pictures in {folder}: evaluate with --config.eval.pictures=4 or more"
        )
    rows = [images.decode_image(file.read_bytes()) for file in files]
    width = max(row.shape[1] for row in rows)
    white = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    whole = np.concatenate(
        [np.pad(r, w, constant_values=255) for r, w in zip(rows, white, strict=True)]
    )
    times = -(-_WIDTH // width)
    return cv2.resize(whole, None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=mirror.argument, metavar="WORKDIR")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    workdirs = options.workdirs
    try:
        print(table(workdirs))
        for workdir in workdirs:
            step = evaluate.last_results(workdir).step
            print(f"pictures: {evaluate.result_folder(workdir, step) / 'pictures'}")
        if options.picture:
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            options.picture.write_bytes(images.encode_png(picture(workdirs[-1])))
    except FileNotFoundError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
