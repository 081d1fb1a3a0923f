"""Propagation in a volume, 128³ of 4 classes with 104 neighbours: time and memory on a CPU.

    pip install -e '.[bench,torch,dev]' && JAX_PLATFORMS=cpu python -m benchmarks.volume_propagation

Four steps of both operators, against the walk as compiled loops (numba) and two floors: reading the
weights once a step, as any program must that does not keep them in its caches, here as a copy of
half as many bytes; and one copy of inputs and result. First all walks are checked on a small volume
against a sparse product. The second part predicts what memory a program takes beside its inputs, of
three sizes. Writes results/volume_propagation_PLATFORM.json.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
import rich.console
import rich.table

from benchmarks import timing
from dilaff_jax import affinity, propagate
from tests import oracles

SIDES = (32, 64, 128)
CLASSES, STEPS = 4, 4
OFFSETS = affinity.offsets((1, 2, 4, 8), 3)
WALK, SIGNED, LOOPS = "random walk", "signed", "random walk, numba"
READS, COPY = "floor: weights read once a step", "floor: one copy"


@numba.njit(parallel=True, fastmath=True)
def loops(probs, weights, offsets, steps):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The walk, voxel by voxel; normalised in every step, from weights that stay as they are."""
    depth, height, width, classes = probs.shape
    source, target = probs.copy(), np.empty_like(probs)
    for _ in range(steps):
        for z in numba.prange(depth):
            moved = np.empty(classes, np.float32)
            for y in range(height):
                for x in range(width):
                    total = np.float32(1)
                    for c in range(classes):
                        moved[c] = source[z, y, x, c]
                    for k in range(len(offsets)):
                        w, v, u = z + offsets[k, 0], y + offsets[k, 1], x + offsets[k, 2]
                        if 0 <= w < depth and 0 <= v < height and 0 <= u < width:
                            weight = weights[z, y, x, k]
                            total += weight
                            for c in range(classes):
                                moved[c] += weight * source[w, v, u, c]
                    for c in range(classes):
                        target[z, y, x, c] = moved[c] / total
        source, target = target, source
    return source


def inputs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[1, n, n, n, C]` and affinities `[1, n, n, n, K]`."""
    rng = np.random.default_rng(0)
    probs = rng.random((1, side, side, side, CLASSES), dtype=np.float32) + 0.01
    probs /= probs.sum(axis=-1, keepdims=True)
    return probs, rng.random((1, side, side, side, len(OFFSETS)), dtype=np.float32)


def programs(side: int) -> dict[str, Any]:
    """Both operators, compiled for a volume of this side."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(side)]
    walk = jax.jit(lambda p, a: propagate.random_walk(p, a, OFFSETS, steps=STEPS))
    signed = jax.jit(lambda p, a: propagate.signed(p, a, OFFSETS, steps=STEPS, strength=0.05))
    return {WALK: walk.lower(*shapes).compile(), SIGNED: signed.lower(*shapes).compile()}


def check() -> None:
    """All walks against a sparse product, on a small volume. Raises AssertionError."""
    probs, weights = inputs(12)
    expected = oracles.csr_random_walk(probs[0], weights[0], OFFSETS, steps=STEPS)
    for found in (
        programs(12)[WALK](probs, weights)[0],
        loops(probs[0], weights[0], OFFSETS, STEPS),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def contenders(side: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    probs, weights = inputs(side)
    compiled = programs(side)
    arrays = jnp.asarray(probs), jnp.asarray(weights)
    source, target = np.ones(weights.size // 2, np.float32), np.empty(weights.size // 2, np.float32)

    def reads() -> None:
        for _ in range(STEPS):  # half read, half written: as many bytes as the weights have
            np.copyto(target, source)

    everything = np.ones(weights.size // 2 + probs.size, np.float32)
    kept = np.empty_like(everything)
    return {
        WALK: lambda: jax.block_until_ready(compiled[WALK](*arrays)),
        SIGNED: lambda: jax.block_until_ready(compiled[SIGNED](*arrays)),
        LOOPS: lambda: loops(probs[0], weights[0], OFFSETS, STEPS),
        READS: reads,
        COPY: lambda: np.copyto(kept, everything),
    }


def memory(side: int) -> dict[str, dict[str, int]]:
    """Bytes of inputs and of what a program takes beside them, by operator."""
    found = {}
    for name, program in programs(side).items():
        needs = program.memory_analysis()
        found[name] = {
            "inputs": needs.argument_size_in_bytes,
            "temporaries": needs.temp_size_in_bytes,
        }
    return found


def main() -> None:
    """Checks, measures, prints the tables, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=SIDES[-1])
    args = parser.parse_args()
    check()
    seconds = timing.interleaved(contenders(args.side), args.repeats)
    medians = timing.median(seconds)
    table = rich.table.Table(
        title=f"{args.side}³ x {CLASSES}, K = {len(OFFSETS)}, {STEPS} steps", title_justify="left"
    )
    for column in ("", "ms", "/ weights read once a step"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(name, f"{1e3 * value:.0f}", f"{value / medians[READS]:.2f}")
    rich.console.Console().print(table)
    content = {
        "command": "python -m benchmarks.volume_propagation",
        **timing.provenance("numpy", "numba"),
        "side": args.side,
        "K": len(OFFSETS),
        "steps": STEPS,
        "median_seconds": medians,
        "ratio_to_reads": {name: value / medians[READS] for name, value in medians.items()},
        "seconds": seconds,
        "memory": {str(side): memory(side) for side in SIDES},
    }
    print(f"written: {timing.write(f'volume_propagation_{jax.default_backend()}', content)}")


if __name__ == "__main__":
    main()
