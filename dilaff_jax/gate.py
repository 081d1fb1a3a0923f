"""Pixels that propagation leaves as they are: by their class, and by how sure the network is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real

from dilaff_jax.errors import UserError


def gated(
    refine: Callable[[jax.Array, jax.Array, np.ndarray], jax.Array],
    keep: Real[ArrayLike, " C"],
) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """An operator that leaves pixels as they are: q'[i] = p⁰[i] where `kept`, else q[i].

    Within the steps it takes part as any, so what its neighbours become does not change. Our
    choice.

    Args:
        refine: an operator, see `propagate.operator`.
        keep: in [0, 1] for each class, see `kept`.

    Raises:
        UserError: not one number in [0, 1] for each class; the operator raises it, too, for
            probabilities of another number of classes.
    """
    limits = _checked(keep)

    def refined(probs: jax.Array, affinity_logits: jax.Array, offsets: np.ndarray) -> jax.Array:
        before = jnp.asarray(probs, jnp.float32)
        after = refine(probs, affinity_logits, offsets)
        return jnp.where(kept(before, limits)[..., None], before, after)

    return refined


def kept(
    probs: Float[ArrayLike, " *pixels C"], keep: Real[ArrayLike, " C"]
) -> Bool[jax.Array, " *pixels"]:
    """Whether p[c] > keep[c] for the class c that a pixel is of, the likeliest.

    keep[c] = 0 keeps all pixels of class c, 1 none, and 0.9 those whose class is surer than that.

    Args:
        probs: p, `[..., C]`.
        keep: `[C]`.

    Raises:
        UserError: another number of classes.
    """
    probs, limits = jnp.asarray(probs), jnp.asarray(keep, jnp.float32)
    if limits.shape != probs.shape[-1:]:
        raise UserError(
            f"refine.keep has {limits.size} numbers, and the probabilities are of "
            f"{probs.shape[-1]} classes; give one for each class, or None (--refine=config does "
            "without what --mode fit chose)"
        )
    likeliest = probs == probs.max(axis=-1, keepdims=True)
    # As a maximum of numbers, which every format of an exported file has.
    return jnp.where(likeliest, probs - limits, -1).max(axis=-1) > 0


def _checked(keep: ArrayLike) -> np.ndarray:
    try:
        limits = np.asarray(keep, np.float32)
        fits = limits.ndim == 1 and bool(((limits >= 0) & (limits <= 1)).all())
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"refine.keep is {keep!r}; expected a number in [0, 1] for each class, or None"
        )
    return limits
