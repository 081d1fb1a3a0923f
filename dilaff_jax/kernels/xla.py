"""The propagation operators in XLA: on every platform, in any number of dimensions.

How the steps are summed was chosen by measurement (benchmarks/propagation.py): on a CPU, static
slices of an array padded once a step, channels last, fuse into one loop; shifts written as pads of
their own, or dynamic slices, do not.
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax.affinity import inside
from dilaff_jax.errors import UserError
from dilaff_jax.numerics import log_probs

Order: TypeAlias = Literal["joint", "coarse_to_fine", "fine_to_coarse"]
Offsets: TypeAlias = tuple[tuple[int, ...], ...]

# Sharpness, threshold, self_weight, restart; None where it changes nothing.
WalkOptions: TypeAlias = tuple[ArrayLike | None, ArrayLike | None, ArrayLike, ArrayLike | None]

# Numbers that one register of a CPU holds (AVX2; half of one with AVX-512).
_LANES = 8


def random_walk(
    probs: jax.Array,
    affinity: jax.Array,
    options: WalkOptions,
    offsets: Offsets,
    steps: int,
    order: Order,
    on_cpu: bool = False,
) -> jax.Array:
    """`propagate.random_walk`, see there; `on_cpu`: padded to whole registers of classes."""
    sharpness, threshold, self_weight, restart = options
    start = _widen(probs.astype(jnp.float32), on_cpu)
    weights = affinity.astype(jnp.float32)
    if sharpness is not None or threshold is not None:
        weights = _gate(
            weights,
            1 if sharpness is None else sharpness,
            0 if threshold is None else threshold,
        )
    if order == "joint":
        advance = _joint(weights, self_weight, offsets, on_cpu)
    else:
        advance = _sweep(weights, self_weight, offsets, order)

    # A step's 2·K intermediate maps are computed again in the backward pass, not kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        walked = advance(p)
        if restart is not None:
            walked = jnp.asarray((1 - restart) * walked + restart * start)
        return walked, None

    return jax.lax.scan(step, start, length=steps)[0][..., : probs.shape[-1]]


def signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    offsets: Offsets,
    steps: int,
    on_cpu: bool = False,
) -> jax.Array:
    """`propagate.signed`, see there, of votes that were not tempered; `on_cpu` as above."""
    unary = _widen(log_probs(probs.astype(jnp.float32)), on_cpu, -jnp.inf)
    start = _widen(probs.astype(jnp.float32), on_cpu)
    # Neighbours outside read the zeros that pad q, so they need no mask of their own.
    weights = jnp.asarray(strength * (affinity_logits.astype(jnp.float32) - bias))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(q: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.softmax(unary + _weighted_sum(q, weights, offsets)), None

    return jax.lax.scan(step, start, length=steps)[0][..., : probs.shape[-1]]


@jax.jit
def votes(affinity_logits: jax.Array, bias: jax.Array, repulsion: ArrayLike) -> jax.Array:
    """The votes s(ℓ - b) of `propagate.signed`, `[B, *spatial, K]`."""
    evidence = affinity_logits.astype(jnp.float32) - bias
    return jnp.where(evidence < 0, repulsion * evidence, evidence)


def _gate(affinity: jax.Array, sharpness: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """a^β·1[a > τ]. exp(β·log a), because XLA vectorises it where it calls a library for `pow`."""
    is_open = affinity > threshold
    # log 0 is kept out of the branch not taken too: its gradient would be 0·∞.
    return jnp.where(is_open, jnp.exp(sharpness * jnp.log(jnp.where(is_open, affinity, 1))), 0)


def _widen(x: jax.Array, on_cpu: bool, fill: float = 0.0) -> jax.Array:
    """Fills up the classes to a multiple of 8 on a CPU, whose registers hold so many.

    Of 21 classes the last five would be done one by one.
    """
    classes = x.shape[-1]
    if not on_cpu or classes < _LANES:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -classes % _LANES)], constant_values=fill)


def _inside_sum(weights: jax.Array, offsets: Offsets, on_cpu: bool) -> jax.Array:
    """Σ_o weights[i,o] over the neighbours inside the image, `[B, *spatial, 1]`."""
    spatial = weights.shape[1:-1]
    is_inside = inside(spatial, np.array(offsets))
    if not on_cpu or not all(isinstance(n, int) for n in spatial):
        return jnp.sum(weights * is_inside, axis=-1, keepdims=True)
    # Where i+o is inside is asked along the border only: everywhere, XLA asks it number by number.
    total = weights.sum(axis=-1, keepdims=True)
    for axis, n in enumerate(spatial):
        reach = min(max(abs(o[axis]) for o in offsets), n)
        for first in (0, n - reach):
            border = (slice(None),) * axis + (slice(first, first + reach),)
            of_border = weights[:, *border] * is_inside[border]
            corner = [0] * total.ndim
            corner[1 + axis] = first
            total = jax.lax.dynamic_update_slice(
                total, of_border.sum(axis=-1, keepdims=True), corner
            )
    return total


def _normalise(total: jax.Array, self_weight: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """What to multiply the neighbours' weights by, given their sum, and the pixel's own share."""
    whole = jnp.asarray(self_weight + total)
    alone = whole == 0
    whole = jnp.where(alone, 1, whole)
    return 1 / whole, jnp.where(alone, 1, self_weight / whole)


def _weighted_sum(p: jax.Array, weights: jax.Array, offsets: Offsets) -> jax.Array:
    """Σ_o weights[i,o]·p[i+o], zero outside."""
    spatial = p.shape[1:-1]
    reach = [min(max(abs(o[a]) for o in offsets), n) for a, n in enumerate(spatial)]
    padded = jnp.pad(p, [(0, 0), *((r, r) for r in reach), (0, 0)])
    total = jnp.zeros_like(p)
    for k, offset in enumerate(offsets):
        if any(abs(o) >= n for o, n in zip(offset, spatial, strict=True)):
            continue  # longer than the image: no pixel has this neighbour
        window = tuple(
            slice(r + o, r + o + n) for r, o, n in zip(reach, offset, spatial, strict=True)
        )
        total = total + weights[..., k : k + 1] * padded[(slice(None), *window)]
    return total


def _joint(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, on_cpu: bool
) -> Callable[[jax.Array], jax.Array]:
    """One walk step over all offsets at once."""
    scale, own = _normalise(_inside_sum(weights, offsets, on_cpu), self_weight)
    # Neighbours outside read the zeros that pad p, so their weights need not be set to 0.
    return lambda p: own * p + scale * _weighted_sum(p, weights, offsets)


def _sweep(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, order: Order
) -> Callable[[jax.Array], jax.Array]:
    """One walk step for each dilation in turn, as a scan over the dilation-shifted maps."""
    weights = weights * inside(weights.shape[1:-1], np.array(offsets))
    groups: dict[int, list[int]] = {}
    for k, offset in enumerate(offsets):
        groups.setdefault(max(map(abs, offset)), []).append(k)
    dilations = sorted(groups, reverse=order == "coarse_to_fine")
    directions = [[tuple(x // d for x in offsets[k]) for k in groups[d]] for d in dilations]
    if any(other != directions[0] for other in directions):
        raise UserError(f"order {order!r} needs the same directions in the same order per dilation")
    stacked = jnp.stack([weights[..., groups[d]] for d in dilations])
    scale, own = _normalise(stacked.sum(axis=-1, keepdims=True), self_weight)
    share = scale * stacked
    reach = max(dilations)

    def sub_step(
        p: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        dilation, share, own = xs
        padded = jnp.pad(p, [(0, 0), *[(reach, reach)] * (p.ndim - 2), (0, 0)])
        total = own * p
        for k, u in enumerate(directions[0]):
            corner: list[ArrayLike] = [0, *(reach + dilation * x for x in u), 0]
            total = total + share[..., k : k + 1] * jax.lax.dynamic_slice(padded, corner, p.shape)
        return total, None

    return lambda p: jax.lax.scan(sub_step, p, (jnp.array(dilations), share, own))[0]
