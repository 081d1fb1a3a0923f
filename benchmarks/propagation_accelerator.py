"""Times propagation on a GPU or TPU: kernel, XLA, torch eager and torch.compile, interleaved.

    pip install -e '.[bench,torch,dev]' && python -m benchmarks.propagation_accelerator

The joint random walk (K = 32, dilations 1, 2, 4, 8; 4 steps), arrays on the device already. "auto"
is what users get: the kernel on a TPU, XLA on a GPU; "xla" is XLA on both. torch runs where it
finds CUDA. All must agree before a clock starts. The floor is a copy of as many bytes as
reading the inputs and writing the result once; the share of the bandwidth is of the data sheet's.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import torch

from benchmarks import timing
from dilaff_jax import affinity, propagate
from dilaff_jax.preflight import chips
from tests import oracles

SIZES = {
    "8x129x129x21": (8, 129, 129, 21),
    "1x513x513x21": (1, 513, 513, 21),
    "1x1024x2048x19": (1, 1024, 2048, 19),
}
STEPS = 4
OFFSETS = affinity.offsets()
OURS, FLOOR = "dilaff_jax, auto", "floor: one copy"


def torch_contenders(probs: np.ndarray, weights: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The walk in torch on the GPU, eager and compiled; none without CUDA."""
    if not torch.cuda.is_available():
        return {}
    arrays = tuple(
        torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().cuda() for x in (probs, weights)
    )

    def timed(walk: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            refined = walk(*arrays, OFFSETS, steps=STEPS)
            torch.cuda.synchronize()
            return refined

        return run

    walk = oracles.torch_random_walk
    return {"torch eager": timed(walk), "torch.compile": timed(torch.compile(walk))}


def contenders(size: tuple[int, int, int, int]) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns what is to be timed at one size, and the bytes of inputs and result."""
    rng = np.random.default_rng(0)
    probs = rng.random(size, dtype=np.float32) + 0.01
    probs /= probs.sum(axis=-1, keepdims=True)
    weights = rng.random((*size[:-1], len(OFFSETS)), dtype=np.float32)
    arrays = jnp.asarray(probs), jnp.asarray(weights)
    moved = 2 * probs.nbytes + weights.nbytes
    buffer = jnp.zeros(moved // 8)

    def ours(backend: propagate.Backend) -> Callable[[], jax.Array]:
        walk = jax.jit(
            lambda p, a: propagate.random_walk(p, a, OFFSETS, steps=STEPS, backend=backend)
        )
        return lambda: jax.block_until_ready(walk(*arrays))

    rivals = torch_contenders(probs, weights)
    runs = {OURS: ours("auto"), "dilaff_jax, xla": ours("xla")}
    expected = np.asarray(runs[OURS]())
    np.testing.assert_allclose(runs["dilaff_jax, xla"](), expected, atol=1e-5)
    for name, run in rivals.items():
        found = run().permute(0, 2, 3, 1).cpu().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
    # What is added may not be known, or the copy would be none.
    copy = jax.jit(jnp.add)
    floor = {FLOOR: lambda: jax.block_until_ready(copy(buffer, 1.0))}
    return {**runs, **rivals, **floor}, moved


def table(record: dict[str, Any]) -> rich.table.Table:
    """Lays out one size's medians, with ratios to ours and the share of peak bandwidth."""
    title = f"{record['size']}, K={len(OFFSETS)}, {STEPS} steps"
    result = rich.table.Table(title=title, title_justify="left")
    for column in ("", "median ms", "/ ours", "% of peak"):
        result.add_column(column, justify="right" if column else "left")
    for name, seconds in sorted(record["median_seconds"].items(), key=lambda item: item[1]):
        share = record["share_of_peak_bandwidth"][name]
        result.add_row(
            name,
            f"{1e3 * seconds:.3f}",
            f"{seconds / record['median_seconds'][OURS]:.2f}",
            "" if share is None else f"{100 * share:.1f}",
        )
    return result


def measure(size: str, repeats: int) -> dict[str, Any]:
    """Times all contenders at one size."""
    runs, moved = contenders(SIZES[size])
    seconds = timing.interleaved(runs, repeats, size)
    medians = timing.median(seconds)
    peak = chips.of(jax.devices()[0]).bandwidth
    return {
        "size": size,
        "bytes_read_and_written_once": moved,
        "median_seconds": medians,
        "share_of_peak_bandwidth": {
            name: None if peak is None else moved / median / peak
            for name, median in medians.items()
        },
        "seconds": seconds,
    }


def main() -> None:
    """Times all sizes, prints a table each, writes results/propagation_PLATFORM.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--output", default="", help="name of the file in results/")
    args = parser.parse_args()
    platform = jax.devices()[0].platform
    if platform == "cpu" and not args.output:
        parser.error("found a CPU only, which benchmarks.propagation measures; or give --output")
    console = rich.console.Console()
    records = []
    for size in args.sizes:
        records.append(measure(size, args.repeats))
        console.print(table(records[-1]))
    path = timing.write(
        args.output or f"propagation_{platform}",
        {
            "command": "python -m benchmarks.propagation_accelerator",
            **timing.provenance("jaxlib", "torch"),
            "K": len(OFFSETS),
            "steps": STEPS,
            "results": records,
        },
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
