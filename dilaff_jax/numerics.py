"""Logarithms that stay finite, and the check of numbers that a person gives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dilaff_jax.errors import UserError

# In place of a logit of -infinity, "never", where nobody looks for one: exp gives 0 all the same.
NEVER = -1e4
# Below this a probability is nothing but rounding.
TINY = 1e-30


def log_probs(probs: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Log max(p, 1e-30): the logarithm of probabilities, finite also where one is zero."""
    return jnp.log(jnp.maximum(probs, TINY))


def check_range(name: str, x: ArrayLike, low: float, high: float, hint: str = "") -> None:
    """Raises UserError unless all of `x` is finite and in [low, high]; silent under tracing."""
    if x is None or isinstance(x, str):
        raise UserError(f"{name} is {x!r}; expected a number, or an array of them")
    if isinstance(x, jax.core.Tracer) or np.size(x) == 0:
        return
    if isinstance(x, jax.Array):
        with jax.ensure_compile_time_eval():  # a constant may be checked while others are traced
            smallest, largest = (float(v) for v in _range(x))
    else:
        smallest, largest = float(np.min(x)), float(np.max(x))
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise UserError(f"{name} holds NaN or infinity; expected finite values")
    if smallest < low or largest > high:
        raise UserError(
            f"{name} has values in [{smallest:g}, {largest:g}]; expected [{low:g}, {high:g}]"
            + (f": {hint}" if hint else "")
        )


@jax.jit
def _range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x), jnp.max(x)
