"""Pixels that propagation leaves as they are: by their class, and by how sure the network is.

Of the image, not of the affinities' grid: a cell of it that is left alone would still change with
its neighbours once it is enlarged, and of a pole one pixel wide nothing would be left.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real

from dilaff_jax.errors import UserError

Operator: TypeAlias = Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]


class Gated:
    """An operator that leaves pixels as they are: q'[i] = p⁰[i] where `kept`, else q[i].

    Within the steps a pixel takes part as any, so what its neighbours become does not change. Our
    choice.

    Args:
        refine: an operator, see `propagate.operator`.
        keep: in [0, 1] for each class, see `kept`.

    Attributes:
        refine: as given.
        keep: float32 `[C]`.

    Raises:
        UserError: not one number in [0, 1] for each class; a call raises it, too, for
            probabilities of another number of classes.
    """

    def __init__(self, refine: Operator, keep: Real[ArrayLike, " C"]) -> None:
        self.refine, self.keep = refine, _checked(keep)

    def __call__(
        self, probs: jax.Array, affinity_logits: jax.Array, offsets: np.ndarray
    ) -> jax.Array:
        """Probabilities of pixels, which are then those of the affinities' grid."""
        before = jnp.asarray(probs, jnp.float32)
        after = self.refine(probs, affinity_logits, offsets)
        return jnp.where(kept(before, self.keep)[..., None], before, after)


def ungated(refine: Operator) -> Operator:
    """An operator without its gate, if it has one."""
    return refine.refine if isinstance(refine, Gated) else refine


def limits(refine: Operator) -> np.ndarray | None:
    """`keep` of an operator, None without a gate."""
    return refine.keep if isinstance(refine, Gated) else None


def corrected(
    scores: Float[ArrayLike, " B *size C"],
    change: Float[ArrayLike, " B *size C"],
    keep: Real[ArrayLike, " C"] | None,
) -> Float[jax.Array, " B *size C"]:
    """Logits and what propagation adds to them, where the gate lets it.

    Args:
        scores: logits, enlarged to the image.
        change: the correction, enlarged likewise, see `propagate.refine_logits`.
        keep: `[C]`, see `kept`; None for no gate.

    Raises:
        UserError: another number of classes.
    """
    scores = jnp.asarray(scores)
    full = scores + change
    if keep is None:
        return full
    return jnp.where(kept(jax.nn.softmax(scores), keep)[..., None], scores, full)


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
    probs, numbers = jnp.asarray(probs), jnp.asarray(keep, jnp.float32)
    if numbers.shape != probs.shape[-1:]:
        raise UserError(
            f"refine.keep has {numbers.size} numbers, and the probabilities are of "
            f"{probs.shape[-1]} classes; give one for each class, or None (--refine=config does "
            "without what --mode fit chose)"
        )
    likeliest = probs == probs.max(axis=-1, keepdims=True)
    # As a maximum of numbers, which every format of an exported file has.
    return jnp.where(likeliest, probs - numbers, -1).max(axis=-1) > 0


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
