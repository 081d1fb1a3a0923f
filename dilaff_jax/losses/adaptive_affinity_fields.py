"""Adaptive affinity fields: the rival that asks for affinity in the loss alone, without a head."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Integer, Real

from dilaff_jax import affinity
from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.losses.loss_sum import LossSum, check_segmentation

# Class probabilities `[B, *spatial, C]` and labels `[B, *spatial]`.
Maps: TypeAlias = tuple[jax.Array, jax.Array]

# The label of ignored pixels and of what lies outside the image.
_NONE = -1
# The authors' clip: probabilities this small carry no more evidence.
_LEAST = 1e-4


def adaptive_affinity_fields(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    sizes: Sequence[int] = (1, 2, 3),
    margin: float = 3.0,
    edge_weights: Real[ArrayLike, " C S"] | None = None,
    not_edge_weights: Real[ArrayLike, " C S"] | None = None,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """The AAF loss: predictions agree across a pair of pixels of one class, and differ otherwise.

    For class c, pixel i and j = i+o, with o the corners and sides of a square of half-width s:
    D_c = KL(p_j[c] ‖ p_i[c]) of Bernoulli distributions, probabilities and complements clipped to
    [1e-4, 1]. Where exactly one of the two pixels is of class c ("edge") the term is
    u[y_i, s]·max(0, margin - D_c), elsewhere ("not edge") v[y_i, s]·D_c. Two masks, as in the
    authors' code: a pair counts only if it, *and* i's pair across (i-o), is inside the image and
    labelled. The sum is scaled by 2S, so that `finish` gives the authors'
    Σ_s mean(edge) + mean(not edge); their decay 10^(-step/steps) is the caller's. Ke, Hwang, Liu
    and Yu 2018 (https://arxiv.org/abs/1803.10335, twke18/Adaptive_Affinity_Fields).

    Args:
        logits: `[B, *spatial, C]`, at the stride of the labels.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        sizes: the S half-widths; the authors' (1, 2, 3) are squares of 3, 5 and 7 pixels.
        margin: the divergence at which two pixels differ enough.
        edge_weights: u, `[C, S]`; in the adaptive version a softmax over sizes of parameters that
            are trained to *raise* the loss. None is 1 everywhere: fields of fixed size.
        not_edge_weights: v, likewise.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[S, 2]`: edge, not edge.

    Raises:
        UserError: as `cross_entropy`; weights that are not `[C, S]`.
    """
    logits, classes, labelled = check_segmentation(logits, labels, ignore_label)
    shape = logits.shape[-1], len(sizes)
    u = _weights("edge_weights", edge_weights, shape)
    v = _weights("not_edge_weights", not_edge_weights, shape)
    offsets = affinity.offsets(sizes, ndim=classes.ndim - 1)
    size = np.repeat(np.arange(len(sizes)), len(offsets) // len(sizes))
    maps = jax.nn.softmax(logits), jnp.where(labelled, classes, _NONE)
    padded = _pad(maps, max(sizes))

    # Recomputed in the backward pass: every offset would otherwise keep several maps of C.
    @jax.checkpoint
    def pairs(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        offset, u, v = xs
        return None, _pair_terms(maps, padded, offset, max(sizes), margin, (u, v))

    _, terms = jax.lax.scan(pairs, None, (jnp.asarray(offsets), u.T[size], v.T[size]))
    total, count = jnp.moveaxis(terms.reshape(len(sizes), -1, 2, 2).sum(axis=1), 1, 0)
    # Minimum and maximum may return their other operand for NaN: the clips could swallow it.
    total = jnp.where(jnp.isnan(logits).any(), jnp.nan, total)
    return LossSum(2 * len(sizes) * total, count)


def _pair_terms(
    maps: Maps,
    padded: Maps,
    offset: jax.Array,
    reach: int,
    margin: float,
    weights: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Sums and counts over the pairs (i, i+offset): `[[edge, not edge], [count, count]]`."""
    probs, labels = maps
    neighbour, other = (
        _cut(padded[0], maps[0], offset, reach),
        _cut(padded[1], labels, offset, reach),
    )
    opposite = _cut(padded[1], labels, -offset, reach)
    valid = ((labels != _NONE) & (other != _NONE) & (opposite != _NONE))[..., None]
    classes = jnp.arange(probs.shape[-1])
    edge = (classes == labels[..., None]) != (classes == other[..., None])
    divergence = _clipped_kl(neighbour, probs) + _clipped_kl(1 - neighbour, 1 - probs)
    u, v = (w[jnp.maximum(labels, 0)][..., None] for w in weights)
    apart, together = u * jnp.maximum(0, margin - divergence), v * divergence
    masks = valid & edge, valid & ~edge
    sums = [jnp.sum(jnp.where(m, x, 0)) for m, x in zip(masks, (apart, together), strict=True)]
    return jnp.array([sums, [jnp.sum(m, dtype=jnp.float32) for m in masks]])


def _pad(maps: Maps, reach: int) -> Maps:
    probs, labels = maps
    around = [(0, 0), *[(reach, reach)] * (labels.ndim - 1)]
    return jnp.pad(probs, [*around, (0, 0)]), jnp.pad(labels, around, constant_values=_NONE)


def _cut(padded: jax.Array, like: jax.Array, offset: jax.Array, reach: int) -> jax.Array:
    """x[i + offset] from `x` padded by `reach`."""
    corner = [0, *(reach + o for o in offset), 0][: like.ndim]
    return jax.lax.dynamic_slice(padded, corner, like.shape)


def _clipped_kl(p: jax.Array, q: jax.Array) -> jax.Array:
    p, q = jnp.clip(p, _LEAST, 1), jnp.clip(q, _LEAST, 1)
    return p * jnp.log(p / q)


def _weights(name: str, weights: ArrayLike | None, shape: tuple[int, int]) -> jax.Array:
    if weights is None:
        return jnp.ones(shape, jnp.float32)
    if np.shape(weights) != shape:
        raise UserError(f"{name} have shape {np.shape(weights)}; expected [C, S] = {shape}")
    return jnp.asarray(weights, jnp.float32)
