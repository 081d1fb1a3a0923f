"""Propagation whose weights mean nothing by themselves: learned through it alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from dilaff_jax import affinity
from dilaff_jax.kernels import xla
from dilaff_jax.kernels.xla import Offsets
from dilaff_jax.numerics import check_range, log_probs


def cspn(
    probs: Real[ArrayLike, " B *spatial C"],
    affinity_logits: Real[ArrayLike, " B *spatial K"],
    offsets: np.ndarray,
    *,
    steps: int = 5,
    bias: ArrayLike = 0.0,
) -> Float[Array, " B *spatial C"]:
    """Convolutional spatial propagation: s ← κ₀·s⁰ + Σ_o κ[·,o]·s[·+o], then softmax(s).

    κ[i,o] = g[i,o] / Σ_o |g[i,o]| over the o with i+o inside the image, 0 for the others and where
    all g are 0; κ₀ = 1 - Σ_o κ[i,o]; g = ℓ - b, s⁰ = log p⁰. Weights may be negative, and their
    absolute values sum to one, so no step grows without bound. CSPN (Cheng, Wang and Yang 2018,
    https://arxiv.org/abs/1808.00150) as its authors' code has it; scores of classes for their depth
    and dilated neighbours for their window are our choice.

    To compare with affinities that are learned as such: `config.refine.name =
    "dilaff_jax.baselines:cspn"`, `config.loss.refined = 1`, `config.loss.affinity = 0`.

    Args:
        probs: p⁰, `[B, *spatial, C]`, ≥ 0.
        affinity_logits: ℓ, `[B, *spatial, K]`, finite.
        offsets: `[K, ndim]`, from `affinity.offsets`.
        steps: T ≥ 0.
        bias: b, see `propagate.signed`.

    Returns:
        float32 `[B, *spatial, C]`, on the simplex.

    Raises:
        UserError: shapes that do not match; outside `jit`, a value out of range or not finite.
    """
    probs, logits = jnp.asarray(probs), jnp.asarray(affinity_logits)
    rows = affinity.check_shapes(probs, logits, offsets, steps, "affinity_logits")
    check_range("probs", probs, 0, np.inf)
    check_range("affinity_logits", logits, -np.inf, np.inf)
    check_range("bias", bias, -np.inf, np.inf)
    return _cspn(probs, logits - affinity.per_offset(bias, offsets), rows, int(steps))


@functools.partial(jax.jit, static_argnames=("offsets", "steps"))
def _cspn(probs: jax.Array, guide: jax.Array, offsets: Offsets, steps: int) -> jax.Array:
    start = log_probs(probs.astype(jnp.float32))
    weights = guide.astype(jnp.float32) * affinity.inside(probs.shape[1:-1], np.array(offsets))
    size = jnp.abs(weights).sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(size == 0, 1, size)
    own = (1 - weights.sum(axis=-1, keepdims=True)) * start

    # A step's maps are computed again in the backward pass, not kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(s: jax.Array, _: None) -> tuple[jax.Array, None]:
        return own + xla.weighted_sum(s, weights, offsets), None

    return jax.nn.softmax(jax.lax.scan(step, start, length=steps)[0])
