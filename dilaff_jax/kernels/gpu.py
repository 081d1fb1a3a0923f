"""Propagation on a GPU: one launch a step, in which a program makes all classes of its pixels.

What bounds a step is not the memory but the cache: a pixel reads K neighbours in every class, and a
row of them that does not begin where a line of the cache begins costs two reads. So a program
copies its tile, with a border as wide as the neighbours are far, into shared memory, which is read
anywhere at full speed; the copy engine brings the next classes while one is summed. A thread keeps
the weights of its pixels in registers over all classes, and where its pixels share a neighbour,
four rows apart, it reads that once. In Pallas for Mosaic, for Hopper and later chips.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from dilaff_jax.kernels import backends, gpu_step
from dilaff_jax.kernels.xla import gate
from dilaff_jax.numerics import log_probs

# A loop of at most so many steps is written out, which saves what a loop costs.
_UNROLLED = 8


def signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    *,
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
    interpret: bool = False,
) -> jax.Array:
    """`propagate.signed` of votes that were not tempered, a launch a step; see there.

    Args:
        probs: p⁰, `[B, *spatial, C]`.
        affinity_logits: ℓ, `[B, *spatial, K]`.
        strength: λ.
        bias: b, `[K]`.
        offsets: K tuples.
        steps: T.
        interpret: run without a GPU.

    Returns:
        float32 `[B, *spatial, C]`.
    """
    rule = gpu_step.Rule(
        prepare=lambda logits: jnp.asarray(strength * (logits - bias)),
        added=log_probs,
        weigh=lambda votes: votes,
        is_softmax=True,
    )
    return _run(rule, probs, affinity_logits, (), offsets, steps, interpret)


def random_walk(
    probs: jax.Array,
    affinity: jax.Array,
    options: tuple[ArrayLike | None, ArrayLike | None, ArrayLike, ArrayLike | None],
    *,
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
    interpret: bool = False,
) -> jax.Array:
    """`propagate.random_walk`, order "joint", a launch a step; see there.

    Args:
        probs: `[B, *spatial, C]`.
        affinity: a, `[B, *spatial, K]`.
        options: sharpness, threshold, self_weight, restart; None where it changes nothing.
        offsets: K tuples.
        steps: T.
        interpret: run without a GPU.

    Returns:
        float32 `[B, *spatial, C]`.
    """
    sharpness, threshold, self_weight, restart = options

    def weigh(shares: list[jax.Array], numbers: Any) -> list[jax.Array]:
        self_weight, keep = numbers[0], numbers[1]
        total = functools.reduce(jnp.add, shares) + self_weight
        alone = total == 0
        total = jnp.where(alone, 1.0, total)
        scale = keep / total
        own = jnp.where(alone, keep, self_weight * scale)
        return [*(x * scale for x in shares), own]

    rule = gpu_step.Rule(
        prepare=lambda x: (
            x if sharpness is None and threshold is None else gate(x, sharpness, threshold)
        ),
        added=None if restart is None else lambda p: jnp.asarray(restart * p),
        weigh=weigh,
        is_softmax=False,
    )
    keep = 1 if restart is None else 1 - restart
    return _run(rule, probs, affinity, (self_weight, keep), offsets, steps, interpret)


def obstacle(probs: Any, guide: Any, scalars: Any, offsets: Any) -> str | None:
    """Why the kernel does not take these maps, in words; None where it does.

    It takes maps of one or two dimensions and of fixed shape, with scalar options, on chips with a
    copy engine (compute capability 9.0). Within a `shard_map` it needs check_vma=False. (Where
    `jit` alone distributes arrays over GPUs, by their sharding and without a mesh in context, a
    kernel gathers them: use a `shard_map`, or "xla".)

    Args:
        probs: `[B, *spatial, C]`.
        guide: affinities or their logits, `[B, *spatial, K]`.
        scalars: a tree of the options that the kernel wants to be scalars.
        offsets: K tuples.
    """
    shared = backends.obstacle(probs, guide, scalars)
    if shared:
        return shared
    if probs.ndim > 4:
        return f"maps have {probs.ndim - 2} spatial dimensions, not one or two"
    capability = backends.capability()
    major = capability.partition(".")[0]
    if capability and not (major.isdigit() and int(major) >= 9):
        return f"the GPU is of compute capability {capability}, and the kernel needs 9.0 or more"
    tile = gpu_step.Tile.of(offsets)
    if isinstance(tile, str):
        return tile
    spatial = (1, *probs.shape[1:-1])[-2:]
    pixels = math.prod(
        (-(-n // size) + 2 * border) * size
        for n, size, border in zip(spatial, tile.size, tile.border, strict=True)
    )
    if probs.shape[0] * max(probs.shape[-1], guide.shape[-1]) * pixels >= 2**31:
        return f"the shapes {probs.shape} and {guide.shape} are beyond indices of 32 bits"
    return None


def _run(
    rule: gpu_step.Rule,
    probs: jax.Array,
    guide: jax.Array,
    options: tuple[ArrayLike, ...],
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
    interpret: bool,
) -> jax.Array:
    """Lays out the arrays, makes the steps, and lays out the result."""
    batch, *spatial, classes = probs.shape
    offsets, tile = gpu_step.in_the_plane(offsets), gpu_step.Tile.of(offsets)
    assert isinstance(tile, gpu_step.Tile)
    height, width = (1, *spatial)[-2:]
    tiles = [-(-n // size) for n, size in zip((height, width), tile.size, strict=True)]
    frame = [border * size for border, size in zip(tile.border, tile.size, strict=True)]

    def padded(x: jax.Array, frame: Any = (0, 0)) -> jax.Array:
        """`[B, *spatial, C]` as `[B, rows, columns, C]` of whole tiles, within a frame of zeros."""
        x = x.astype(jnp.float32).reshape(batch, height, width, x.shape[-1])
        pads = [
            (around, count * size - n + around)
            for around, count, size, n in zip(frame, tiles, tile.size, (height, width), strict=True)
        ]
        # First of all, as XLA then lays out an array in one pass over it.
        return jnp.pad(x, [(0, 0), *pads, (0, 0)])

    def planes(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, -1, 1)

    def is_inside(axis: int, size: int) -> jax.Array:
        """Where the neighbours are, on one axis of whole tiles: `[n, K]`."""
        at = jnp.arange(tiles[axis] * tile.size[axis])[:, None] + np.array(offsets)[:, axis]
        return (at >= 0) & (at < size)

    # Neighbours outside the map weigh nothing, whatever a step leaves there.
    where = is_inside(0, height)[:, None] & is_inside(1, width)
    weights = jnp.where(where, rule.prepare(padded(guide)), 0)
    weights, maps = planes(weights), planes(padded(probs, frame))
    fixed = [] if rule.added is None else [planes(rule.added(padded(probs)))]
    numbers = [jnp.stack([jnp.asarray(x, jnp.float32) for x in options])] if options else []
    given = (len(numbers), len(fixed))
    call = plgpu.kernel(
        lambda *refs: gpu_step.Program(refs, given, tile, rule, offsets, interpret).run(),
        out_type=jax.ShapeDtypeStruct(maps.shape, jnp.float32),
        scratch_types=gpu_step.scratch(tile, rule, classes),
        grid=(batch, *(n + 2 * border for n, border in zip(tiles, tile.border, strict=True))),
        grid_names=("image", "row", "column"),
        # Barriers are where they are needed.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=_interpreter() if interpret else None,
        kernel_name="propagation_step",
    )

    def step(maps: jax.Array, _: None) -> tuple[jax.Array, None]:
        return call(weights, maps, *numbers, *fixed), None

    maps = jax.lax.scan(step, maps, length=steps, unroll=min(max(steps, 1), _UNROLLED))[0]
    maps = maps[:, :, frame[0] : frame[0] + height, frame[1] : frame[1] + width]
    return jnp.moveaxis(maps, 1, -1).reshape(batch, *spatial, classes)


def _interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):  # since JAX 0.11
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams()
