"""Propagation on a GPU: one launch a step, in which a program makes all classes of its pixels.

What bounds a step of a large map is not the memory but the caches: a pixel reads K neighbours in
every class, and XLA its K weights as often. Here a thread loads the weights of its two pixels once,
into registers, and then goes through the classes. Maps and weights lie as planes, so that the 32
threads of a warp, pixels of one row, read 128 bytes in a piece.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import ArrayLike

from dilaff_jax.kernels import backends
from dilaff_jax.kernels.xla import gate
from dilaff_jax.numerics import log_probs

# Pixels of a program, rows by columns, and its warps of 32 threads: two pixels a thread, so
# that more of its loads are under way at a time.
_TILE = (16, 32)
_WARPS = 8
# Less than any logit, and its exponential is 0.
_NOTHING = -1e30
# More weights than this do not fit into the registers of a thread, of which there are 255.
_MOST_WEIGHTS = 104


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

    def weigh(logits: list[jax.Array], options: Any) -> list[jax.Array]:
        strength, bias = options
        return [strength[0] * (x - bias[k]) for k, x in enumerate(logits)]

    rule = _Rule(weigh, is_softmax=True)
    unary = log_probs(probs.astype(jnp.float32))
    return _run(rule, probs, affinity_logits, unary, (strength, bias), offsets, steps, interpret)


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
    if sharpness is not None or threshold is not None:
        affinity = gate(affinity.astype(jnp.float32), sharpness, threshold)
    start = None if restart is None else jnp.asarray(restart) * probs.astype(jnp.float32)

    def weigh(shares: list[jax.Array], options: Any) -> list[jax.Array]:
        self_weight, keep = options
        total = functools.reduce(jnp.add, shares, self_weight[0])
        alone = total == 0
        total = jnp.where(alone, 1.0, total)
        own = jnp.where(alone, 1.0, self_weight[0] / total)
        scale = keep[0] / total
        return [*(x * scale for x in shares), keep[0] * own]

    rule = _Rule(weigh, is_softmax=False)
    keep = 1 if restart is None else 1 - restart
    return _run(rule, probs, affinity, start, (self_weight, keep), offsets, steps, interpret)


def obstacle(probs: Any, guide: Any, scalars: Any) -> str | None:
    """Why the kernel does not take these maps, in words; None where it does.

    It takes maps of one to three dimensions and of fixed shape, with scalar options. Within a
    `shard_map` it needs check_vma=False. (Kernels cannot be partitioned automatically: where `jit`
    distributes arrays over GPUs by their sharding, use a `shard_map`, or "xla".)

    Args:
        probs: `[B, *spatial, C]`.
        guide: affinities or their logits, `[B, *spatial, K]`.
        scalars: a tree of the options that the kernel wants to be scalars.
    """
    shared = backends.obstacle(probs, guide, scalars)
    if shared:
        return shared
    if guide.shape[-1] > _MOST_WEIGHTS:
        return f"{guide.shape[-1]} weights a pixel are more than {_MOST_WEIGHTS} registers hold"
    if max(probs.size, guide.size) >= 2**31:
        return f"the shapes {probs.shape} and {guide.shape} are beyond indices of 32 bits"
    return None


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What tells one operator from another.

    weigh(guides, options): K maps of a tile to the K weights, and perhaps the pixel's own.
    """

    weigh: Any
    is_softmax: bool


def _run(
    rule: _Rule,
    probs: jax.Array,
    guide: jax.Array,
    added: jax.Array | None,
    options: tuple[ArrayLike, ...],
    offsets: tuple[tuple[int, ...], ...],
    steps: int,
    interpret: bool,
) -> jax.Array:
    """Lays out the arrays, makes the steps, and lays out the result."""
    missing = 3 - (probs.ndim - 2)
    offsets = tuple((0,) * missing + o for o in offsets)

    def planes(x: jax.Array) -> jax.Array:
        """`[B, *spatial, C]` as `[B, C, D, H, W]`; bfloat16 stays as it is read."""
        x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        return jnp.moveaxis(x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:]), -1, 1)

    weights, maps = planes(guide), planes(probs.astype(jnp.float32))
    fixed = [] if added is None else [planes(added)]
    numbers = [jnp.asarray(x, jnp.float32).reshape(-1) for x in options]
    depth, height, width = maps.shape[2:]
    rows, columns = _TILE
    tiles = depth * pl.cdiv(height, rows) * pl.cdiv(width, columns)
    whole = pl.BlockSpec()
    call = pl.pallas_call(
        functools.partial(_kernel, rule=rule, offsets=offsets, interpret=interpret),
        grid=(tiles, maps.shape[0]),
        in_specs=[[whole] * len(numbers), whole, whole, [whole] * len(fixed)],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(maps.shape, jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="propagation_step",
    )

    def step(maps: jax.Array, _: None) -> tuple[jax.Array, None]:
        return call(numbers, weights, maps, fixed), None

    # In pairs, so that a map takes turns with another and none is copied.
    maps = jax.lax.scan(step, maps, length=steps, unroll=2)[0]
    return jnp.moveaxis(maps, 1, -1).reshape(probs.shape)


def _kernel(
    options: Any,
    guide: Any,
    maps: Any,
    added: Any,
    out: Any,
    *,
    rule: _Rule,
    offsets: tuple[tuple[int, ...], ...],
    interpret: bool,
) -> None:
    """One tile: its weights, then the classes."""
    classes, pixels = maps.shape[1], _Pixels(maps.shape[2:])
    guides = [pixels.load(guide, k, offset) for k, offset in enumerate(offsets)]
    weights = rule.weigh(guides, options)

    def total(c: jax.Array) -> jax.Array:
        result = jnp.zeros(_TILE, jnp.float32)
        if added:
            result = pixels.load(added[0], c)
        if len(weights) > len(offsets):
            result += weights[-1] * pixels.load(maps, c)
        for weight, offset in zip(weights, offsets, strict=False):
            result += weight * pixels.load(maps, c, offset, at=offset)
        return result

    if not rule.is_softmax:
        _for(classes, lambda c, _: pixels.store(out, c, total(c)), None)
        return

    def score(c: jax.Array, seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Leaves the logits in the result, and keeps their maximum and the sum of exponentials."""
        most, sum_ = seen
        logits = total(c)
        pixels.store(out, c, logits)
        more = jnp.maximum(most, logits)
        return more, sum_ * jnp.exp(most - more) + jnp.exp(logits - more)

    least = jnp.full(_TILE, _NOTHING, jnp.float32)
    most, sum_ = _for(classes, score, (least, jnp.zeros_like(least)))
    if not interpret:
        triton.debug_barrier()  # what is read next was written above, perhaps by another thread
    _for(
        classes,
        lambda c, _: pixels.store(out, c, jnp.exp(pixels.load(out, c) - most) / sum_),
        None,
    )


class _Pixels:
    """The pixels of this program, `[rows, columns]`.

    Args:
        spatial: (D, H, W) of the map.
    """

    def __init__(self, spatial: tuple[int, int, int]) -> None:
        self._spatial, (_, height, width) = spatial, spatial
        rows, columns = _TILE
        across, down = pl.cdiv(width, columns), pl.cdiv(height, rows)
        tile, self._image = pl.program_id(0), pl.program_id(1)
        y = tile // across % down * rows + jax.lax.broadcasted_iota(jnp.int32, _TILE, 0)
        x = tile % across * columns + jax.lax.broadcasted_iota(jnp.int32, _TILE, 1)
        self._place = (tile // (across * down), y, x)
        self._here = (y < height) & (x < width)

    def load(
        self,
        ref: Any,
        channel: Any,
        sees: tuple[int, ...] = (0, 0, 0),
        at: tuple[int, ...] = (0, 0, 0),
    ) -> jax.Array:
        """A channel of every pixel, moved by `at`; 0 where the pixel moved by `sees` is outside."""
        mask = self._here
        for place, offset, size in zip(self._place, sees, self._spatial, strict=True):
            if offset:
                mask &= (place + offset >= 0) & (place + offset < size)
        moved = [place + offset for place, offset in zip(self._place, at, strict=True)]
        source = ref.at[self._image, channel, *moved]
        return triton.load(source, mask=mask, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, channel: Any, value: jax.Array) -> None:
        """Writes a channel of every pixel."""
        triton.store(ref.at[self._image, channel, *self._place], value, mask=self._here)


def _for(stop: int, body: Any, init: Any) -> Any:
    return jax.lax.fori_loop(0, stop, body, init)
