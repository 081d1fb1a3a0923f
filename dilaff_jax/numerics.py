"""Logarithms that stay finite."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# In place of a logit of -infinity, "never", where nobody looks for one: exp gives 0 all the same.
NEVER = -1e4
# Below this a probability is nothing but rounding.
TINY = 1e-30


def log_probs(probs: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Log max(p, 1e-30): the logarithm of probabilities, finite also where one is zero."""
    return jnp.log(jnp.maximum(probs, TINY))
