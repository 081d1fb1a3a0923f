"""Batch normalisation as a CPU is fast at it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """y = γ·(x - μ)/√(σ² + ε) + β; variables are named as those of `flax.linen.BatchNorm`.

    Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167). Computed as y = a·x + b, as torch
    does: x - μ is then not kept beside x for the backward pass, in which the gradient
    a·dy + c·x + d needs two sums over the pixels and no more. (A TPU moves less in Flax's form,
    the one above.) Sums are in float32, over all devices of `axis_name`.

    Attributes:
        use_running_average: normalise with the running statistics and leave them as they are.
        momentum: of the running statistics: r ← m·r + (1 - m)·new.
        epsilon: ε.
        dtype: of the result.
        axis_name: the mapped axis over which the statistics are averaged, if any.
        two_pass: σ² as E[(x - E x)²] instead of E[x²] - (E x)², and y from x - μ. For maps of few
            pixels, where a difference of large numbers would leave nothing but rounding.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    dtype: Any = jnp.float32
    axis_name: str | None = None
    two_pass: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to the same shape."""
        channels = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        wide = x.astype(jnp.float32)
        if self.use_running_average:
            centre, spread = mean.value, var.value
        else:
            centre, spread = self._statistics(wide)
            if not self.is_initializing():
                for running, new in ((mean, centre), (var, spread)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        slope = scale * jax.lax.rsqrt(spread + self.epsilon)
        if self.two_pass:
            return ((wide - centre) * slope + bias).astype(self.dtype)
        return (wide * slope + (bias - centre * slope)).astype(self.dtype)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels = tuple(range(x.ndim - 1))
        if self.two_pass:
            mean = self._average(x.mean(pixels))
            return mean, self._average(jnp.square(x - mean).mean(pixels))
        # Joined, so that the devices speak once.
        mean, square = self._average(jnp.stack([x.mean(pixels), jnp.square(x).mean(pixels)]))
        return mean, jnp.maximum(square - jnp.square(mean), 0)

    def _average(self, local: jax.Array) -> jax.Array:
        if self.axis_name is None or self.is_initializing():
            return local
        return jax.lax.pmean(local, self.axis_name)
