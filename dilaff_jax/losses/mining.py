"""Weights that pick or stress the largest losses, chosen within each image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dilaff_jax.errors import UserError
from dilaff_jax.numerics import TINY


def hardest(
    loss: jax.Array, eligible: jax.Array, number: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Weights in [0, 1] that pick the `number` largest eligible losses along `axes`.

    They sum to `number`, or to all that are eligible if fewer; ties share a place equally, so that
    the choice does not depend on the order of pixels.
    """
    # Rounding may leave a loss just below 0, where `_largest` does not look.
    loss = jax.lax.stop_gradient(jnp.where(eligible, jnp.maximum(loss, 0), -1))
    number = jnp.minimum(number, count_along(eligible, axes))
    limit = _largest(lambda t: count_along(loss >= t, axes) >= number, number)
    above, level = eligible & (loss > limit), eligible & (loss == limit)
    share = (number - count_along(above, axes)) / jnp.maximum(count_along(level, axes), 1)
    return above + share * level


def pooling_weights(
    loss: jax.Array, eligible: jax.Array, p: float, ratio: float, axes: tuple[int, ...]
) -> jax.Array:
    """n·w of loss max-pooling along `axes`: min(1, (ℓ/α)^(q-1)) / ratio^(1/p), 0 if not eligible.

    ‖w‖_p = n^(-1/q) reads Σ min(1, (ℓ/α)^q) = ratio·n, which is decreasing in α.
    """
    if not p > 1 or not 0 < ratio <= 1:
        raise UserError(f"p is {p} and ratio is {ratio}; expected p > 1 and ratio in (0, 1]")
    q = p / (p - 1)
    loss = jax.lax.stop_gradient(jnp.where(eligible, loss, 0))
    log_loss = jnp.log(jnp.maximum(loss, 0))
    support = ratio * count_along(eligible, axes)

    def reaches(alpha: jax.Array) -> jax.Array:
        capped = jnp.exp(jnp.minimum(0, q * (log_loss - jnp.log(alpha))))
        return jnp.sum(capped, axis=axes, keepdims=True) >= support

    # With fewer positive losses than `support` the p-norm is not reached: α = 0, all at the cap.
    alpha = jnp.maximum(_largest(reaches, support), TINY)
    weights = jnp.exp(jnp.minimum(0, (q - 1) * (log_loss - jnp.log(alpha))))
    return jnp.where(eligible, weights / ratio ** (1 / p), 0)


def count_along(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """How many are true along `axes`, float32, axes kept."""
    return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.float32)


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest float32 ≥ 0 at which a decreasing condition holds, in the shape of `like`.

    Bisection on the bits: positive floats are ordered as their bit patterns, so 31 passes are
    exact, and nothing has to be sorted.
    """

    def step(i: jax.Array, low: jax.Array) -> jax.Array:
        trial = low | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        return jnp.where(holds(jax.lax.bitcast_convert_type(trial, jnp.float32)), trial, low)

    bits = jax.lax.fori_loop(0, 31, step, jnp.zeros_like(like, jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
