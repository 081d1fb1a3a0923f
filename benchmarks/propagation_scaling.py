"""How the time of the random walk grows with pixels, classes, neighbours and steps.

    pip install -e '.[dev]' && python -m benchmarks.propagation_scaling

One of them is varied, the others stay at 257², 21 classes, K = 32, 4 steps; all runs of one curve
are interleaved. The exponent e of seconds = a·x^e is fitted by least squares of the logarithms to
the medians. Beside them the bytes that the compiled program needs besides inputs and results, which
must not grow with the steps. Writes results/propagation_scaling_PLATFORM.json.
"""

import argparse
import functools
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from benchmarks import timing
from dilaff_jax import affinity, propagate
from dilaff_jax.runtime.cost import temporaries

DEFAULT = {"side": 257, "classes": 21, "dilations": 4, "steps": 4}
CURVES: dict[str, tuple[str, tuple[int, ...]]] = {
    "pixels": ("side", (65, 129, 257, 513, 1025)),
    "classes": ("classes", (4, 8, 16, 32, 64, 128)),
    "neighbours": ("dilations", (1, 2, 3, 4, 5, 6)),
    "steps": ("steps", (1, 2, 4, 8, 16, 32)),
}


def program(side: int, classes: int, dilations: int, steps: int) -> tuple[Any, tuple[Any, Any]]:
    """The walk, and what it is applied to; dilations are 1, 2, 4, ..., so many of them."""
    offsets = affinity.offsets(tuple(2**d for d in range(dilations)))
    rng = np.random.default_rng(0)
    probs = rng.random((1, side, side, classes), np.float32)
    probs /= probs.sum(axis=-1, keepdims=True)
    weights = rng.random((1, side, side, len(offsets)), np.float32)
    walk = functools.partial(propagate.random_walk, offsets=offsets, steps=steps)
    return walk, (jax.device_put(probs), jax.device_put(weights))


def extent(curve: str, settings: dict[str, int]) -> int:
    """What the horizontal axis of a curve counts."""
    if curve == "pixels":
        return settings["side"] ** 2
    return 8 * settings["dilations"] if curve == "neighbours" else settings[curve]


def measure(curve: str, repeats: int) -> dict[str, Any]:
    """The points of one curve and its exponent."""
    key, values = CURVES[curve]
    runs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for value in values:
        settings = DEFAULT | {key: value}
        walk, arguments = program(**settings)
        rows.append(
            {curve: extent(curve, settings), "temporary_bytes": temporaries(walk, *arguments)}
        )
        runs[str(value)] = functools.partial(
            lambda f, a: jax.block_until_ready(f(*a)), jax.jit(walk), arguments
        )
    seconds = timing.interleaved(runs, repeats, curve)
    medians = timing.median(seconds)
    for row, value in zip(rows, values, strict=True):
        row["median_seconds"] = medians[str(value)]
        row["seconds"] = seconds[str(value)]
    x = np.log([row[curve] for row in rows])
    y = np.log([row["median_seconds"] for row in rows])
    exponent, _ = np.polyfit(x, y, 1)
    return {"curve": curve, "exponent": float(exponent), "points": rows}


def main() -> None:
    """Measures, prints and writes all curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    curves = [measure(curve, repeats) for curve in CURVES]
    table = rich.table.Table(title="random walk, median ms")
    for column in ("varied", "exponent", "ms", "temporary MB"):
        table.add_column(column)
    for found in curves:
        points = found["points"]
        table.add_row(
            found["curve"] + " " + ", ".join(str(p[found["curve"]]) for p in points),
            f"{found['exponent']:.2f}",
            ", ".join(f"{1e3 * p['median_seconds']:.1f}" for p in points),
            ", ".join(f"{p['temporary_bytes'] / 1e6:.1f}" for p in points),
        )
    rich.console.Console().print(table)
    path = timing.write(
        f"propagation_scaling_{jax.default_backend()}",
        {
            "command": "python -m benchmarks.propagation_scaling",
            **timing.provenance("jaxlib", "numpy"),
            "default": DEFAULT,
            "curves": curves,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
