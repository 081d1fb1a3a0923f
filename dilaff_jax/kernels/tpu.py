"""Propagation on a TPU: one kernel that keeps rows of a map in VMEM over all steps.

The map is read and written once, whatever the number of steps. It lies as `[B, H, C, W]`, the order
in which XLA lays out `[B, H, W, C]` on a TPU, so that the transposition costs nothing: a vertical
shift is another row, a horizontal one a rotation of lanes. A map too large for VMEM is cut into
bands of rows, each read with the steps · reach rows on either side that it depends on.

The sum over offsets (v, u) is Σ_u rotate(Σ_v w'[v,u] · p[row + v], u), with weights w' rotated back
once for all steps: a step then takes one rotation for each distinct u, not for each offset.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from dilaff_jax.kernels.bands import Plan, cost, scoped_vmem
from dilaff_jax.numerics import log_probs

# The logarithm of what pads the classes: its exponential is 0, and sums with it stay finite.
_NOTHING = -1e30


def signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    plan: Plan,
    interpret: Any = False,
) -> jax.Array:
    """`propagate.signed` in one kernel; see there.

    Args:
        probs: p⁰, `[B, H, W, C]`.
        affinity_logits: ℓ, `[B, H, W, K]`.
        strength: λ.
        bias: b, `[K]`.
        plan: from `plan`.
        interpret: run without a TPU: True, or `pltpu.InterpretParams`.

    Returns:
        float32 `[B, H, W, C]`.
    """

    def prepare(logits: jax.Array, inside: jax.Array, options: Any) -> Any:
        strength, bias = options
        return jnp.where(inside, strength * (logits - bias), 0), None

    def start(p: jax.Array, options: Any) -> jax.Array:
        return log_probs(p)

    def finish(total: jax.Array) -> jax.Array:
        e = jnp.exp(total - jnp.max(total, axis=0, keepdims=True))
        return e / jnp.sum(e, axis=0, keepdims=True)

    rule = _Rule(prepare, start, finish, _NOTHING)
    return _call(rule, probs, affinity_logits, (strength, bias), plan, interpret)


def random_walk(
    probs: jax.Array,
    affinity: jax.Array,
    options: tuple[ArrayLike | None, ArrayLike | None, ArrayLike, ArrayLike | None],
    plan: Plan,
    interpret: Any = False,
) -> jax.Array:
    """`propagate.random_walk`, order "joint", in one kernel; see there.

    Args:
        probs: `[B, H, W, C]`.
        affinity: a, `[B, H, W, K]`.
        options: sharpness, threshold, self_weight, restart; None where it changes nothing.
        plan: from `plan`.
        interpret: run without a TPU: True, or `pltpu.InterpretParams`.

    Returns:
        float32 `[B, H, W, C]`.
    """
    gated = options[0] is not None or options[1] is not None
    restarts = options[3] is not None

    def prepare(a: jax.Array, inside: jax.Array, options: Any) -> Any:
        sharpness, threshold, self_weight, restart = options
        if gated:
            opened = a > threshold
            a = jnp.where(opened, jnp.exp(sharpness * jnp.log(jnp.where(opened, a, 1))), 0)
        a = jnp.where(inside, a, 0)
        total = self_weight + jnp.sum(a, axis=0, keepdims=True)
        alone = total == 0
        total = jnp.where(alone, 1, total)
        own = jnp.where(alone, 1, self_weight / total)
        keep = 1 - restart
        return (keep * (a / total), keep * own) if restarts else (a / total, own)

    def start(p: jax.Array, options: Any) -> jax.Array:
        return options[3] * p

    rule = _Rule(prepare, start if restarts else None, lambda total: total, 0.0)
    values = tuple(n if x is None else x for x, n in zip(options, (1, 0, 1, 0), strict=True))
    return _call(rule, probs, affinity, values, plan, interpret)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What tells one operator from another, for a row of the map, channels by columns.

    prepare(guide, inside, options) -> (weights [K, W], the pixel's own [1, W] or None);
    start(p⁰, options) -> what is added in every step (None: nothing), beyond the classes `padding`;
    finish(sum) -> the row after the step.
    """

    prepare: Callable[..., tuple[jax.Array, jax.Array | None]]
    start: Callable[..., jax.Array] | None
    finish: Callable[[jax.Array], jax.Array]
    padding: float


def _call(
    rule: _Rule,
    probs: jax.Array,
    guide: jax.Array,
    options: tuple[ArrayLike, ...],
    plan: Plan,
    interpret: Any,
) -> jax.Array:
    """Lays out the arrays, runs `_kernel` on every band, and lays out the result."""
    batch, height, width, classes = plan.size
    k = len(plan.offsets)
    buffered = None if plan.buffers == 2 else pl.Buffered(plan.buffers)
    columns = [jnp.asarray(x, jnp.float32).reshape(-1, 1) for x in options]

    def whole(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda b, band: (0, 0))

    def window(channels: int) -> pl.BlockSpec:
        block = (pl.Squeezed(), pl.Element(plan.window), pl.Element(channels), pl.Element(width))
        return pl.BlockSpec(
            block, lambda b, band: (b, plan.first(band), 0, 0), pipeline_mode=buffered
        )

    offsets = jnp.asarray(np.array(plan.offsets, np.int32))
    maps = (plan.window, plan.classes, plan.width)
    call = pl.pallas_call(
        functools.partial(_kernel, rule=rule, plan=plan),
        grid=(batch, plan.bands),
        in_specs=[[whole(x) for x in columns], whole(offsets), window(classes), window(k)],
        out_specs=pl.BlockSpec(
            (None, plan.rows, classes, width),
            lambda b, band: (b, band, 0, 0),
            pipeline_mode=buffered,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, height, classes, width), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((plan.channels, plan.width), jnp.float32),
            pltpu.VMEM((plan.window, plan.channels, plan.width), jnp.float32),
            pltpu.VMEM((2, *maps), jnp.float32),
            pltpu.VMEM(maps if rule.start else (1, *maps[1:]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=scoped_vmem(plan),
        ),
        cost_estimate=cost(plan, probs, guide),
        interpret=interpret,
        name="propagation",
    )
    return jnp.swapaxes(call(columns, offsets, _rows_first(probs), _rows_first(guide)), 2, 3)


def _rows_first(x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` as `[B, H, C, W]`, in float32 but for bfloat16, which stays as it is read."""
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return jnp.swapaxes(x, 2, 3)


def _kernel(
    options: Any,
    offsets: Any,
    probs: Any,
    guide: Any,
    out: Any,
    stage: Any,
    weights: Any,
    maps: Any,
    added: Any,
    *,
    rule: _Rule,
    plan: Plan,
) -> None:
    """One band: weights and start of every row, the steps, the result."""
    height, width, classes = plan.size[1:]
    band = pl.program_id(1)
    first = plan.first(band)
    above = band * plan.rows - first
    values = [option[...] for option in options]
    v, u = offsets[:, 0:1], offsets[:, 1:2]
    column = jax.lax.broadcasted_iota(jnp.int32, (len(plan.offsets), width), 1) + u
    beside = (column >= 0) & (column < width)
    # What lies beyond the classes and columns stays as it is set here.
    stage[...] = jnp.zeros(stage.shape, jnp.float32)

    def prepare(row: jax.Array, _: None) -> None:
        inside = beside & (first + row + v >= 0) & (first + row + v < height)
        shares, own = rule.prepare(guide[row].astype(jnp.float32), inside, values)
        stage[: len(plan.offsets), :width] = shares
        if own is not None:
            stage[len(plan.offsets) : len(plan.offsets) + 1, :width] = own
        weights[row] = _rotate_back(stage[...], plan)
        maps[0, row] = jnp.zeros(maps.shape[2:], jnp.float32)
        maps[0, row, :classes, :width] = probs[row].astype(jnp.float32)
        if rule.start:
            added[row] = jnp.full(added.shape[1:], rule.padding, jnp.float32)
            added[row, :classes, :width] = rule.start(maps[0, row, :classes, :width], values)

    _for(0, plan.window, prepare)

    def step(t: jax.Array, _: None) -> None:
        # Only rows that the band still depends on.
        halo = (plan.steps - 1 - t) * plan.reach

        start = jnp.maximum(above - halo, 0)
        stop = jnp.minimum(above + plan.rows + halo, plan.window)

        def advance(i: jax.Array, _: None) -> None:
            # Past the end the last row is made again. All is read before anything is written: the
            # compiler cannot know that these are two maps, and would wait.
            rows = [
                jnp.minimum(start + i * plan.together + j, stop - 1) for j in range(plan.together)
            ]
            sums = [_weighted_sum(maps.at[t % 2], weights, row, plan) for row in rows]
            if rule.start:
                sums = [total + added[row] for row, total in zip(rows, sums, strict=True)]
            for row, total in zip(rows, [rule.finish(total) for total in sums], strict=True):
                maps[(t + 1) % 2, row] = total

        _for(0, pl.cdiv(stop - start, plan.together), advance)

    _for(0, plan.steps, step)

    def write(row: jax.Array, _: None) -> None:
        out[row] = maps[plan.steps % 2, above + row, :classes, :width]

    _for(0, jnp.minimum(plan.rows, height - band * plan.rows), write)


def _weighted_sum(source: Any, weights: Any, row: jax.Array, plan: Plan) -> jax.Array:
    """Σ_o w[i,o]·p[i+o] for one row, `[classes, columns]`."""
    shares = weights[row]

    def term(k: int, v: int) -> jax.Array:
        # A row outside the map has weight 0, so any row in its place will do.
        return shares[k : k + 1] * source[jnp.clip(row + v, 0, plan.window - 1)]

    columns = (
        _rotate(functools.reduce(jnp.add, (term(k, v) for k, v in terms)), -u)
        for u, terms in plan.terms().items()
    )
    return functools.reduce(jnp.add, columns)


def _rotate_back(weights: jax.Array, plan: Plan) -> jax.Array:
    """Moves the weights `[channels, columns]` of each offset to the column they are read at."""
    moved = weights
    channel = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0)
    for u, terms in plan.terms().items():
        if u:
            chosen = functools.reduce(jnp.logical_or, [channel == k for k, _ in terms])
            moved = jnp.where(chosen, _rotate(weights, u), moved)
    return moved


def _rotate(x: jax.Array, by: int) -> jax.Array:
    return pltpu.roll(x, by % x.shape[1], axis=1) if by else x


def _for(start: Any, stop: Any, body: Callable[[jax.Array, None], None]) -> None:
    jax.lax.fori_loop(start, stop, body, None)
