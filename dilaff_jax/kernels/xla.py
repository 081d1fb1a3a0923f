"""The propagation operators in XLA: on every platform, in any number of dimensions.

How the steps are summed was chosen by measurement (benchmarks/propagation.py): on a CPU, static
slices of an array padded once a step, channels last, fuse into one loop; shifts written as pads of
their own, or dynamic slices, do not. On a GPU the weights of each neighbour are cut out of the map
of weights before the loop over the steps: within it XLA cuts them out anew in every step, a launch
and a pass over the map for each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax.affinity import dilation_of, inside
from dilaff_jax.errors import UserError
from dilaff_jax.numerics import log_probs

Order: TypeAlias = Literal["joint", "coarse_to_fine", "fine_to_coarse"]
# "lanes": padded to whole registers of classes, for a CPU; "apart": a map of weights for each
# neighbour, for a GPU.
Form: TypeAlias = Literal["plain", "lanes", "apart"]
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
    form: Form = "plain",
) -> jax.Array:
    """`propagate.random_walk`, see there, in the form that a platform is fast at."""
    sharpness, threshold, self_weight, restart = options
    start = _widen(probs.astype(jnp.float32), form)
    weights = affinity.astype(jnp.float32)
    if sharpness is not None or threshold is not None:
        weights = gate(weights, sharpness, threshold)
    if order == "joint":
        advance = _joint(weights, self_weight, offsets, form)
    else:
        advance = _sweep(weights, self_weight, offsets, order)

    # A step's 2·K intermediate maps are computed again in the backward pass, not kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        walked = advance(p)
        if restart is not None:
            walked = jnp.asarray((1 - restart) * walked + restart * start)
        return walked, None

    return jax.lax.scan(step, start, length=steps, unroll=_unroll(form))[0][..., : probs.shape[-1]]


def signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    offsets: Offsets,
    steps: int,
    form: Form = "plain",
) -> jax.Array:
    """`propagate.signed`, see there, of votes that were not tempered; `form` as above."""
    unary = _widen(log_probs(probs.astype(jnp.float32)), form, -jnp.inf)
    start = _widen(probs.astype(jnp.float32), form)
    # Neighbours outside read the zeros that pad q, so they need no mask of their own.
    votes = jnp.asarray(strength * (affinity_logits.astype(jnp.float32) - bias))
    weights = _split(votes, form)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(q: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.softmax(unary + weighted_sum(q, weights, offsets)), None

    return jax.lax.scan(step, start, length=steps, unroll=_unroll(form))[0][..., : probs.shape[-1]]


@jax.jit
def votes(affinity_logits: jax.Array, bias: jax.Array, repulsion: ArrayLike) -> jax.Array:
    """The votes s(ℓ - b) of `propagate.signed`, `[B, *spatial, K]`."""
    evidence = affinity_logits.astype(jnp.float32) - bias
    return jnp.where(evidence < 0, repulsion * evidence, evidence)


def gate(
    affinity: jax.Array, sharpness: ArrayLike | None, threshold: ArrayLike | None
) -> jax.Array:
    """a^β·1[a > τ]; None where an option changes nothing.

    Taken as exp(β·log a), because XLA vectorises that where it calls a library for `pow`.
    """
    sharpness = 1 if sharpness is None else sharpness
    threshold = 0 if threshold is None else threshold
    is_open = affinity > threshold
    # log 0 is kept out of the branch not taken too: its gradient would be 0·∞.
    return jnp.where(is_open, jnp.exp(sharpness * jnp.log(jnp.where(is_open, affinity, 1))), 0)


def _split(weights: jax.Array, form: Form) -> Sequence[jax.Array] | jax.Array:
    """The weights of each neighbour, `[B, *spatial, 1]`, or all of them as they are."""
    return jnp.split(weights, weights.shape[-1], axis=-1) if form == "apart" else weights


def _unroll(form: Form) -> int:
    # In pairs, a map on a GPU takes turns with another, and none is copied.
    return 2 if form == "apart" else 1


def _widen(x: jax.Array, form: Form, fill: float = 0.0) -> jax.Array:
    """Fills up the classes to a multiple of 8 on a CPU, whose registers hold so many.

    Of 21 classes the last five would be done one by one.
    """
    classes = x.shape[-1]
    if form != "lanes" or classes < _LANES:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -classes % _LANES)], constant_values=fill)


def _inside_sum(weights: jax.Array, offsets: Offsets, form: Form) -> jax.Array:
    """Σ_o weights[i,o] over the neighbours inside the image, `[B, *spatial, 1]`."""
    spatial = weights.shape[1:-1]
    is_inside = inside(spatial, np.array(offsets))
    if form != "lanes" or not all(isinstance(n, int) for n in spatial):
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


def weighted_sum(
    p: jax.Array, weights: Sequence[jax.Array] | jax.Array, offsets: Offsets
) -> jax.Array:
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
        weight = weights[..., k : k + 1] if isinstance(weights, jax.Array) else weights[k]
        total = total + weight * padded[(slice(None), *window)]
    return total


def _joint(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, form: Form
) -> Callable[[jax.Array], jax.Array]:
    """One walk step over all offsets at once."""
    scale, own = _normalise(_inside_sum(weights, offsets, form), self_weight)
    if form == "apart":  # multiplied as they are cut out: one pass
        shares = _split(weights * scale, form)
        return lambda p: own * p + weighted_sum(p, shares, offsets)
    # Neighbours outside read the zeros that pad p, so their weights need not be set to 0.
    return lambda p: own * p + scale * weighted_sum(p, weights, offsets)


def _sweep(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, order: Order
) -> Callable[[jax.Array], jax.Array]:
    """One walk step for each dilation in turn, as a scan over the dilation-shifted maps."""
    weights = weights * inside(weights.shape[1:-1], np.array(offsets))
    groups: dict[int, list[int]] = {}
    for k, dilation in enumerate(dilation_of(np.array(offsets)).tolist()):
        groups.setdefault(dilation, []).append(k)
    dilations = sorted(groups, reverse=order == "coarse_to_fine")
    rows = [np.array([offsets[k] for k in groups[d]]) for d in dilations]
    # How far a step goes along each axis: the same along all, unless voxels are longer along some.
    along = np.stack([np.abs(r).max(axis=0) for r in rows])
    directions = np.sign(rows[0])
    if any(
        r.shape != rows[0].shape or (r != a * directions).any()
        for r, a in zip(rows, along, strict=True)
    ):
        raise UserError(f"order {order!r} needs the same directions in the same order per dilation")
    stacked = jnp.stack([weights[..., groups[d]] for d in dilations])
    scale, own = _normalise(stacked.sum(axis=-1, keepdims=True), self_weight)
    share = scale * stacked
    reach = int(along.max())

    def sub_step(
        p: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        step, share, own = xs
        padded = jnp.pad(p, [(0, 0), *[(reach, reach)] * (p.ndim - 2), (0, 0)])
        total = own * p
        for k, u in enumerate(directions.tolist()):
            corner: list[ArrayLike] = [0, *(reach + step[a] * x for a, x in enumerate(u)), 0]
            total = total + share[..., k : k + 1] * jax.lax.dynamic_slice(padded, corner, p.shape)
        return total, None

    return lambda p: jax.lax.scan(sub_step, p, (jnp.asarray(along), share, own))[0]
