"""Does propagation in time flicker less? A still scene with noise, frame by frame and as a clip.

    bash launch/quickstart.sh
    JAX_PLATFORMS=cpu python -m benchmarks.flicker --workdir workdirs/quickstart/joint \
        --data_dir data

Each of some images of the run's evaluation split is repeated with new Gaussian noise in every
frame, which is all that differs; counted is the share of pixels whose class is not that of the
frame before, and, as a scene can be still and wrong, the share that is right. Without propagation,
with propagation within frames, and with propagation within and across frames
(`serving.video.propagate_in_time`). The operator is the one that --mode fit chose, where it did.
Writes results/flicker.json.
"""

import argparse
import pathlib
from typing import Any

import numpy as np
import rich.console
import rich.table
from tqdm import tqdm

from benchmarks import timing
from dilaff_jax.data import datasets
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.serving import network, predictor, video

SIGMAS = (1.0, 2.5, 5.0, 10.0, 20.0)
PLAIN, WITHIN, ACROSS = "plain", "within frames", "across frames"


def clip(image: np.ndarray, sigma: float, frames: int, seed: int) -> list[np.ndarray]:
    """Frames of one image, each with noise of its own, RGB uint8 `[H, W, 3]`."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=sigma, size=(frames, *image.shape))
    return list(np.clip(np.rint(image + noise), 0, 255).astype(np.uint8))


def changed(labels: list[np.ndarray]) -> float:
    """The share of pixels that are of another class than in the frame before."""
    return float(np.mean([a != b for a, b in zip(labels[1:], labels[:-1], strict=True)]))


def right(labels: list[np.ndarray], truth: np.ndarray) -> float:
    """The share of labelled pixels that are right, over all frames."""
    return float(np.mean([(x == truth)[truth != IGNORE_LABEL] for x in labels]))


def of_image(
    model: predictor.Predictor, image: np.ndarray, truth: np.ndarray, sigma: float, frames: int
) -> dict[str, tuple[float, float]]:
    """{variant: (changed, right)} of one scene."""
    shots = clip(image, sigma, frames, seed=0)
    single = [model(frame) for frame in shots]
    across = list(video.propagate_in_time(model, iter(shots)))
    maps = {
        PLAIN: [x.plain for x in single],
        WITHIN: [x.labels for x in single],
        ACROSS: [x.labels for x in across],
    }
    return {name: (changed(x), right(x, truth)) for name, x in maps.items()}


def main() -> None:
    """Measures, prints the table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--frames", type=int, default=8)
    args = parser.parse_args()
    model = predictor.load(args.workdir)
    config = network.read_config(args.workdir)
    config.data.data_dir = args.data_dir
    source = datasets.load(config.data, config.data.eval_split)
    rows: list[dict[str, Any]] = []
    table = rich.table.Table(title="changed between frames / right, %", title_justify="left")
    for column in ("noise, of 255", PLAIN, WITHIN, ACROSS):
        table.add_column(column, justify="right")
    count = min(args.images, len(source))
    for sigma in SIGMAS:
        found = [
            of_image(model, source[i]["image"], source[i]["label"], sigma, args.frames)
            for i in tqdm(range(count), desc=f"noise of {sigma:g}", leave=False)
        ]
        row: dict[str, Any] = {"sigma": sigma}
        for name in (PLAIN, WITHIN, ACROSS):
            values = np.array([x[name] for x in found])
            row[name] = dict(zip(("changed", "right"), values.mean(axis=0).tolist(), strict=True))
        difference = np.array([x[ACROSS][0] - x[WITHIN][0] for x in found])
        row["across minus within, changed"] = {
            "mean": float(difference.mean()),
            "standard error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        }
        rows.append(row)
        table.add_row(
            f"{sigma:g}",
            *(
                f"{100 * row[n]['changed']:.2f} / {100 * row[n]['right']:.1f}"
                for n in (PLAIN, WITHIN, ACROSS)
            ),
        )
    rich.console.Console().print(table)
    content = {
        "command": "python -m benchmarks.flicker --workdir workdirs/quickstart/joint",
        **timing.provenance("numpy"),
        "refine": {k: np.asarray(v).tolist() for k, v in model.network.refine.items()},
        "images": count,
        "frames": args.frames,
        "rows": rows,
    }
    print(f"written: {timing.write('flicker', content)}")


if __name__ == "__main__":
    main()
