"""What every loss returns and checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dilaff_jax.errors import UserError
from dilaff_jax.labels import check_values


class LossSum(NamedTuple):
    """Sums and counts of one loss, float32 of equal shape; one entry per term that is normalised.

    Those of devices, batches or images add: `a + b` adds the arrays (not the tuples).
    """

    sum: jax.Array
    count: jax.Array  # type: ignore[assignment]

    def __add__(self, other: "LossSum") -> "LossSum":  # type: ignore[override]
        return LossSum(self.sum + other.sum, self.count + other.count)


def finish(total: LossSum) -> Float[Array, ""]:
    """Returns the loss, a float32 scalar: mean over entries of sum / count, 0 where count is 0."""
    return jnp.mean(total.sum / jnp.where(total.count > 0, total.count, 1))


def check_segmentation(
    logits: ArrayLike, labels: ArrayLike, ignore_label: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 logits, class indices and the mask of labelled pixels, or raises UserError.

    Logits of ignored pixels become 0 and their labels class 0: whatever stands there has no effect
    and gets no gradient. Under `jit`, logits of pixels with an impossible label become NaN.
    """
    shape = np.shape(logits)
    if len(shape) < 2 or np.shape(labels) != shape[:-1]:
        raise UserError(
            f"logits have shape {shape} and labels {np.shape(labels)}; expected [B, *spatial, C] "
            "and [B, *spatial]: resize one to the other first"
        )
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    check_values(labels, shape[-1], ignore_label)
    _refuse_nan(logits)
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    valid = labels != ignore_label
    possible = (labels >= 0) & (labels < logits.shape[-1])
    # A product, so that the gradient is NaN as well; `where` would only spoil the value.
    poison = jnp.where(valid & ~possible, jnp.nan, 1)
    logits = jnp.where(valid[..., None], logits, 0) * poison[..., None]
    return logits, jnp.where(valid & possible, labels, 0), valid


def check_affinity(
    logits: ArrayLike, target: ArrayLike, valid: ArrayLike, num_dilations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 logits, float32 target, bool valid; invalid edges have logit and target 0."""
    check_affinity_shapes(logits, target, valid, num_dilations)
    _refuse_nan(logits)
    if not isinstance(target, jax.core.Tracer) and np.size(target):
        low, high = np.min(target), np.max(target)
        if not (low >= 0 and high <= 1):
            raise UserError(f"target has values in [{low}, {high}]; expected [0, 1]")
    valid = jnp.asarray(valid)
    logits, target = (jnp.asarray(x, jnp.float32) for x in (logits, target))
    return jnp.where(valid, logits, 0), jnp.where(valid, target, 0), valid


def check_edge_weights(weights: ArrayLike | None, valid: jax.Array) -> jax.Array:
    """Returns float32 weights of the edges, 0 where invalid; None is 1 everywhere."""
    if weights is None:
        return valid.astype(jnp.float32)
    if np.shape(weights) != valid.shape:
        raise UserError(
            f"weights have shape {np.shape(weights)}; expected that of the logits, {valid.shape}: "
            "one for every edge, from affinity.pair_weights"
        )
    if not isinstance(weights, jax.core.Tracer) and not np.all(np.asarray(weights) >= 0):
        raise UserError(f"weights go down to {np.min(weights)}; expected 0 or more")
    return jnp.where(valid, jnp.asarray(weights, jnp.float32), 0)


def check_affinity_shapes(
    logits: ArrayLike, target: ArrayLike, valid: ArrayLike, num_dilations: int
) -> None:
    """Raises UserError unless all are `[B, *spatial, K]`, D divides K, and valid is bool."""
    shape = np.shape(logits)
    if len(shape) < 3 or np.shape(target) != shape or np.shape(valid) != shape:
        raise UserError(
            f"logits {shape}, target {np.shape(target)}, valid {np.shape(valid)}: expected one "
            "shape [B, *spatial, K]"
        )
    if num_dilations < 1 or shape[-1] % num_dilations:
        raise UserError(
            f"logits have K = {shape[-1]} channels, not a multiple of num_dilations "
            f"{num_dilations}; expected as many channels for every dilation"
        )
    if jnp.asarray(valid).dtype != bool:
        raise UserError(f"valid has dtype {jnp.asarray(valid).dtype}; expected bool")


def check_gamma(gamma: float) -> None:
    """Raises UserError unless gamma ≥ 0."""
    if not gamma >= 0:
        raise UserError(f"gamma is {gamma}; expected a value of at least 0")


def _refuse_nan(logits: Any) -> None:
    if not isinstance(logits, jax.core.Tracer) and np.isnan(np.asarray(logits, np.float32)).any():
        raise UserError("logits hold NaN; expected numbers")
