"""Counts what propagation moves on a TPU, in XLA and as a kernel; no TPU is needed.

    pip install -e '.[preflight,dev]' && JAX_PLATFORMS=cpu python -m benchmarks.propagation_kernel

Compiles `signed` (K = 32, dilations 1, 2, 4, 8; 4 steps) ahead of time for one chip and reads the
traffic to main memory (HBM) from the compiled program. Two floors: "exact", reading the inputs and
writing the result once; and "as laid out", the same with what the TPU pads them by (129 columns
take 256 lanes), which no program with these arguments can do without. Rows that a band of the
kernel reads beside its own are counted as often as they are read. The programs are of propagation
alone: a change of layout between their arguments and the kernel counts too.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import timing
from dilaff_jax import affinity, propagate
from dilaff_jax.kernels import bands
from dilaff_jax.preflight import hlo
from dilaff_jax.runtime import chips

STEPS = 4
OFFSETS = affinity.offsets()
# (B, H, W, C): stride 4 of a 513² crop, alone and eight of them; stride 4 of Cityscapes; stride 1.
SIZES = [(1, 129, 129, 21), (8, 129, 129, 21), (1, 256, 512, 19), (1, 513, 513, 21)]
# What `kernels.bands.vmem_bytes` says of these chips.
VMEM = {"v5e": 128 * 2**20, "v6e": 128 * 2**20}
BACKENDS: dict[str, propagate.Backend] = {"kernel": "auto", "XLA": "xla"}


def compiled(chip: str, size: tuple[int, int, int, int], backend: propagate.Backend) -> Any:
    """The operator's program for one chip."""
    mesh, spec = Mesh(np.array(chips.devices(f"{chip}:1x1")), ("x",)), PartitionSpec("x")
    shapes = [
        jax.ShapeDtypeStruct((*size[:-1], c), np.float32, sharding=NamedSharding(mesh, spec))
        for c in (size[-1], len(OFFSETS))
    ]
    program = jax.shard_map(
        lambda p, a: propagate.signed(p, a, OFFSETS, steps=STEPS, backend=backend),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(program).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def read_again(size: tuple[int, int, int, int], vmem: int) -> tuple[bands.Plan, int]:
    """The kernel's plan, and the bytes of rows that belong to several bands' windows."""
    batch, height, width, classes = size
    probs, guide = (
        jax.ShapeDtypeStruct((*size[:-1], c), np.float32) for c in (classes, len(OFFSETS))
    )
    offsets = tuple((int(v), int(u)) for v, u in OFFSETS)
    plan = bands.plan(probs, guide, offsets, STEPS, vmem=vmem)
    if isinstance(plan, str):
        raise ValueError(f"the kernel does not take {size}: {plan}")
    channels = -(-classes // 8) * 8 + len(OFFSETS)
    row = 4 * batch * channels * -(-width // 128) * 128
    return plan, row * (plan.bands * plan.window - height)


def measure(chip: str, size: tuple[int, int, int, int], name: str) -> dict[str, Any]:
    """Compiles one program and counts."""
    start = time.perf_counter()
    program = compiled(chip, size, BACKENDS[name])
    seconds = time.perf_counter() - start
    text, memory = program.as_text(), program.memory_analysis()
    is_kernel = "tpu_custom_call" in text
    if is_kernel != (name == "kernel"):
        raise RuntimeError(f"{name} was asked for on {chip}, the program has something else")
    plan, again = read_again(size, VMEM[chip]) if is_kernel else (None, 0)
    exact = 4 * int(np.prod(size[:-1])) * (2 * size[-1] + len(OFFSETS))
    laid_out = memory.argument_size_in_bytes + memory.output_size_in_bytes
    moved = hlo.Program(text).traffic() + again
    record = {
        "chip": chip,
        "size": size,
        "program": name,
        "bytes_moved": moved,
        "bytes_exact": exact,
        "bytes_as_laid_out": laid_out,
        "moved_per_exact": moved / exact,
        "moved_per_laid_out": moved / laid_out,
        "bytes_temporary": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }
    if plan:
        record |= {"bands": plan.bands, "window_rows": plan.window, "vmem_bytes": plan.vmem}
    return record


def table(records: list[dict[str, Any]]) -> rich.table.Table:
    """Lays the records out, one a line."""
    result = rich.table.Table(
        title=f"signed, K={len(OFFSETS)}, {STEPS} steps", title_justify="left"
    )
    columns = ("chip", "B x H x W x C", "", "MB", "/ exact", "/ laid out", "HBM temp MB", "VMEM MB")
    for column in columns:
        result.add_column(column, justify="left" if column in ("chip", "") else "right")
    for r in records:
        result.add_row(
            r["chip"],
            "x".join(map(str, r["size"])),
            r["program"],
            f"{r['bytes_moved'] / 1e6:.1f}",
            f"{r['moved_per_exact']:.2f}",
            f"{r['moved_per_laid_out']:.2f}",
            f"{r['bytes_temporary'] / 1e6:.1f}",
            f"{r['vmem_bytes'] / 1e6:.1f} in {r['bands']}" if "bands" in r else "",
        )
    return result


def main() -> None:
    """Compiles all, prints a table, writes results/propagation_kernel.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--chips", nargs="+", default=list(VMEM), choices=list(VMEM))
    parser.add_argument(
        "--output", default="propagation_kernel", help="name of the file in results/"
    )
    args = parser.parse_args()
    jobs = [(c, s, n) for c in args.chips for s in SIZES for n in BACKENDS]
    records = [measure(*job) for job in tqdm.tqdm(jobs, desc="compiling", leave=False)]
    console = rich.console.Console()
    console.print(table(records))
    path = timing.write(
        args.output,
        {
            "command": "JAX_PLATFORMS=cpu python -m benchmarks.propagation_kernel",
            **timing.provenance("jaxlib", "libtpu"),
            "operator": "signed",
            "K": len(OFFSETS),
            "steps": STEPS,
            "results": records,
        },
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
