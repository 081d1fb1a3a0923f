"""How the kernels cut a map into bands of rows that fit into a TPU's VMEM, and when they do not.

Bands are whole rows, because rows can be cut anywhere, columns only in multiples of 128.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dilaff_jax.kernels import backends

Offsets = tuple[tuple[int, ...], ...]
Map = jax.Array | jax.ShapeDtypeStruct

# A register holds 8 x 128 values of 32 bits: sublanes x lanes.
_SUBLANES, _LANES, _REGISTERS = 8, 128, 64
# Of VMEM; the compiler needs some for itself, and XLA for what runs before and after.
_SHARE = 0.75
# The least that a TPU has; taken where tracing does not know the chip.
_LEAST_VMEM = 16 * 2**20
_MOST_READ = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """How maps are cut into bands of rows.

    Attributes:
        size: (B, H, W, C).
        offsets: K pairs (v, u).
        steps: T.
        rows: of a band.
        window: rows of a band and of what it depends on.
        buffers: 2 to read the next map while this one is refined; 1 where VMEM is short, since
            refining takes much longer than reading.
        vmem: bytes that a band takes there.
    """

    size: tuple[int, int, int, int]
    offsets: Offsets
    steps: int
    rows: int
    window: int
    buffers: int
    vmem: int

    @property
    def bands(self) -> int:
        """Bands of a map."""
        return -(-self.size[1] // self.rows)

    @property
    def reach(self) -> int:
        """Rows that a step looks up or down."""
        return _reach(self.offsets, self.size[1])

    @property
    def together(self) -> int:
        """Rows made at once: two hide what a rotation waits for, if they fit into registers."""
        return 2 if self.classes * self.width <= _REGISTERS * _SUBLANES * _LANES // 4 else 1

    @property
    def classes(self) -> int:
        """Classes, as they are in VMEM."""
        return _up(self.size[3], _SUBLANES)

    @property
    def width(self) -> int:
        """Columns, as they are in VMEM."""
        return _up(self.size[2], _LANES)

    @property
    def channels(self) -> int:
        """Weights, the pixel's own among them, as they are in VMEM."""
        return _up(len(self.offsets) + 1, _SUBLANES)

    def terms(self) -> dict[int, list[tuple[int, int]]]:
        """{u: [(channel, v)]}: offsets with a neighbour inside, and the pixel's own weight."""
        height, width = self.size[1:3]
        by_column: dict[int, list[tuple[int, int]]] = {0: [(len(self.offsets), 0)]}
        for k, (v, u) in enumerate(self.offsets):
            if abs(v) < height and abs(u) < width:
                by_column.setdefault(u, []).append((k, v))
        return by_column

    def first(self, band: Any) -> Any:
        """The first row of the band's window, which lies wholly inside the map."""
        above = band * self.rows - self.steps * self.reach
        return jnp.clip(above, 0, self.size[1] - self.window)


def plan(
    probs: Map,
    guide: Map,
    offsets: Offsets,
    steps: int,
    scalars: Any = (),
    *,
    vmem: int | None = None,
    rows: int | None = None,
) -> Plan | str:
    """How the kernel would refine these maps, or in words why it does not.

    It takes maps of two dimensions and of fixed shape, scalar options, and one step or more, where
    bands that fit into 3/4 of VMEM read a row no more than twice on average. Within a `shard_map`
    it needs check_vma=False. (Mosaic kernels cannot be partitioned automatically: where `jit`
    distributes arrays over TPUs by their sharding, JAX asks for a `shard_map`; or use "xla".)

    Args:
        probs: `[B, H, W, C]`.
        guide: affinities or their logits, `[B, H, W, K]`.
        offsets: K pairs.
        steps: T.
        scalars: a tree of the options that the kernel wants to be scalars.
        vmem: bytes; None for those of the chip that the program is for.
        rows: of a band; None for as many as fit.
    """
    if probs.ndim != 4:
        return f"the maps have {probs.ndim - 2} spatial dimensions, not two"
    obstacle = backends.obstacle(probs, guide, scalars)
    if obstacle:
        return obstacle
    if steps < 1:
        return "there is no step to make"
    batch, height, width, classes = probs.shape
    halo = 2 * steps * _reach(offsets, height)
    limit = int(_SHARE * (vmem or vmem_bytes()))
    buffers = 2 if height * _bytes_a_row(probs, guide, 2) <= limit else 1
    per_row = _bytes_a_row(probs, guide, buffers)
    fitting = limit // per_row
    if rows is None:
        largest = height if fitting >= height else max(1, fitting - halo)
        rows = -(-height // -(-height // largest))
        if -(-height // rows) * min(height, rows + halo) > _MOST_READ * height:
            fitting = 0
    window = min(height, rows + halo)
    if window > fitting:
        return (
            f"VMEM holds too few rows of {width} x ({classes} classes and {len(offsets)} offsets) "
            f"for {steps} steps: {halo} rows beside every band would be read again"
        )
    size = (batch, height, width, classes)
    return Plan(size, offsets, steps, rows, window, buffers, window * per_row)


def vmem_bytes() -> int:
    """VMEM of the chip that is compiled for; the least that a TPU has if that is not known."""
    try:
        return int(pltpu.get_tpu_info().vmem_capacity_bytes)
    except ValueError:  # what runs here is no TPU
        return _LEAST_VMEM


def cost(plan: Plan, probs: Map, guide: Map) -> pl.CostEstimate:
    """For XLA's scheduler: rows beside a band are counted as often as they are read."""
    batch, height, width, classes = plan.size
    pixels = batch * height * width
    read = plan.bands * plan.window / height
    inputs = pixels * (classes * probs.dtype.itemsize + guide.shape[3] * guide.dtype.itemsize)
    return pl.CostEstimate(
        flops=2 * (guide.shape[3] + 1) * classes * pixels * plan.steps,
        transcendentals=classes * pixels * plan.steps,
        bytes_accessed=int(read * inputs) + 4 * pixels * classes,
    )


def scoped_vmem(plan: Plan) -> int:
    """Bytes of VMEM that the compiler may take: the plan's and its own."""
    return max(_LEAST_VMEM, int(plan.vmem / _SHARE))


def _reach(offsets: Offsets, height: int) -> int:
    return max((abs(v) for v, _ in offsets if abs(v) < height), default=0)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _bytes_a_row(probs: Map, guide: Map, buffers: int) -> int:
    """VMEM for one row of a window."""

    def row(channels: int, itemsize: int) -> int:
        return _up(channels, _SUBLANES * 4 // itemsize) * _up(probs.shape[2], _LANES) * itemsize

    classes, k = probs.shape[3], guide.shape[3]
    read = row(classes, probs.dtype.itemsize) + row(k, guide.dtype.itemsize)
    # Beside what is read and written: the maps before and after a step, what is added, weights.
    return buffers * (read + row(classes, 4)) + 3 * row(classes, 4) + row(k + 1, 4)
