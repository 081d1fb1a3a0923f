"""Times the random walk against scipy, torch, numba, DenseCRF and PAMR: one process, interleaved.

    pip install -e '.[bench,torch,crf,dev]' && python -m benchmarks.propagation

All walks get the same probabilities and affinities (K = 32, dilations 1, 2, 4, 8; 4 steps) and must
agree to 1e-5 before a clock starts. DenseCRF (10 iterations) and PAMR (10 iterations) refine from
colours instead, on the same probabilities; PAMR is given the same offsets. Two floors: copying as
many bytes as reading the inputs and writing the result once; and as many multiplications and
additions as the steps need, in the form in which this machine does them fastest, a product of two
square matrices.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
import rich.console
import rich.table
import torch

from benchmarks import timing
from dilaff_jax import affinity, baselines, propagate
from tests import oracles

SIZES = {
    "129x129x21": (129, 129, 21),
    "513x513x21": (513, 513, 21),
    "1024x2048x19": (1024, 2048, 19),
}
STEPS = 4
OFFSETS = affinity.offsets()
OURS = "dilaff_jax"
COPY, ARITHMETIC = "floor: one copy", "floor: arithmetic"


@numba.njit(parallel=True, fastmath=True)
def numba_random_walk(probs, weights, offsets, steps):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The walk as compiled loops over one image; normalises once, as all others do."""
    height, width, classes = probs.shape
    share = np.empty_like(weights)
    own = np.empty((height, width), np.float32)
    for y in numba.prange(height):
        for x in range(width):
            total = np.float32(1)
            for k in range(len(offsets)):
                v, u = y + offsets[k, 0], x + offsets[k, 1]
                inside = 0 <= v < height and 0 <= u < width
                share[y, x, k] = weights[y, x, k] if inside else 0
                total += share[y, x, k]
            share[y, x] /= total
            own[y, x] = 1 / total
    source, target = probs.copy(), np.empty_like(probs)
    for _ in range(steps):
        for y in numba.prange(height):
            for x in range(width):
                for c in range(classes):
                    target[y, x, c] = own[y, x] * source[y, x, c]
                for k in range(len(offsets)):
                    v, u = y + offsets[k, 0], x + offsets[k, 1]
                    if 0 <= v < height and 0 <= u < width:
                        for c in range(classes):
                            target[y, x, c] += share[y, x, k] * source[v, u, c]
        source, target = target, source
    return source


def contenders(
    height: int, width: int, classes: int, rivals_too: bool
) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns what is to be timed at one size, and the bytes of inputs and result."""
    rng = np.random.default_rng(0)
    probs = rng.random((1, height, width, classes), dtype=np.float32) + 0.01
    probs /= probs.sum(axis=-1, keepdims=True)
    weights = rng.random((1, height, width, len(OFFSETS)), dtype=np.float32)
    image = rng.integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    matrix = oracles.csr_matrix(weights[0], OFFSETS)
    flat = probs.reshape(-1, classes)
    torch_arrays = tuple(
        torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (probs, weights)
    )
    torch_walk = functools.partial(oracles.torch_random_walk, offsets=OFFSETS, steps=STEPS)
    compiled = torch.compile(torch_walk)
    arrays = jnp.asarray(probs), jnp.asarray(weights)
    walk = jax.jit(lambda p, a: propagate.random_walk(p, a, OFFSETS, steps=STEPS))

    def csr_product() -> np.ndarray:
        p = flat
        for _ in range(STEPS):
            p = matrix @ p
        return p.reshape(probs.shape)

    runs: dict[str, Callable[[], Any]] = {
        OURS: lambda: jax.block_until_ready(walk(*arrays)),
        "numba": lambda: numba_random_walk(probs[0], weights[0], OFFSETS, STEPS)[None],
        "torch compile": lambda: compiled(*torch_arrays).permute(0, 2, 3, 1).numpy(),
        "torch eager": lambda: torch_walk(*torch_arrays).permute(0, 2, 3, 1).numpy(),
        "scipy CSR product": csr_product,
    }
    expected = runs[OURS]()
    for name, run in runs.items():
        np.testing.assert_allclose(run(), expected, atol=1e-5, err_msg=name)
    runs["scipy CSR build"] = lambda: oracles.csr_matrix(weights[0], OFFSETS)
    if rivals_too:
        runs["DenseCRF, 10 iterations"] = lambda: baselines.dense_crf(probs, image, steps=10)
        pamr = jax.jit(lambda p, i: baselines.pamr(p, i, OFFSETS, steps=10))
        image_array = jnp.asarray(image)
        runs["PAMR, 10 iterations"] = lambda: jax.block_until_ready(pamr(arrays[0], image_array))
    moved = 2 * probs.nbytes + weights.nbytes
    buffers = torch.rand(moved // 8), torch.empty(moved // 8)
    runs[COPY] = lambda: buffers[1].copy_(buffers[0])
    side = round((probs.size * len(OFFSETS) * STEPS) ** (1 / 3))
    square = jnp.asarray(rng.random((side, side), dtype=np.float32))
    product = jax.jit(jnp.dot)
    runs[ARITHMETIC] = lambda: jax.block_until_ready(product(square, square))
    return runs, moved


def table(size: str, medians: dict[str, float]) -> rich.table.Table:
    """Lays out one size's medians, with ratios to ours and to the floor."""
    result = rich.table.Table(
        title=f"{size}, K={len(OFFSETS)}, {STEPS} steps", title_justify="left"
    )
    for column in ("", "median ms", "/ ours", "/ copy"):
        result.add_column(column, justify="right" if column else "left")
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        ratios = (seconds / medians[OURS], seconds / medians[COPY])
        result.add_row(name, f"{1e3 * seconds:.1f}", *(f"{r:.2f}" for r in ratios))
    return result


def main() -> None:
    """Times all sizes, prints a table each, writes results/propagation_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--output", default="propagation_cpu", help="name of the file in results/")
    args = parser.parse_args()
    console = rich.console.Console()
    results = []
    for size in args.sizes:
        runs, moved = contenders(*SIZES[size], rivals_too=True)
        seconds = timing.interleaved(runs, args.repeats, size)
        medians = timing.median(seconds)
        console.print(table(size, medians))
        results.append(
            {
                "size": size,
                "K": len(OFFSETS),
                "steps": STEPS,
                "bytes_read_and_written_once": moved,
                "median_seconds": medians,
                "ratio_to_ours": {n: s / medians[OURS] for n, s in medians.items()},
                "arithmetic_per_copy": medians[ARITHMETIC] / medians[COPY],
                "nanoseconds_per_pixel": medians[OURS] * 1e9 / np.prod(SIZES[size][:2]),
                "seconds": seconds,
            }
        )
    path = timing.write(
        args.output,
        {
            "command": "python -m benchmarks.propagation",
            **timing.provenance("numpy", "scipy", "torch", "numba", "pydensecrf2"),
            "results": results,
        },
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
