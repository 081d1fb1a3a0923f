"""Batch normalisation as one multiplication and one addition."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """y = a·x + b, with a = γ/√(σ² + ε) and b = β - μ·a.

    Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167), in the form in which torch computes
    it. `flax.linen.BatchNorm`, γ·(x - μ)/√(σ² + ε) + β, needs x - μ again in the backward pass and
    so keeps it beside x. Here the gradient is a·dy + c·x + d, for numbers c and d of each channel
    that follow from two sums over the pixels. Variables are named as Flax's. Sums are in float32,
    over all devices of `axis_name`.

    Attributes:
        use_running_average: normalise with the running statistics and leave them as they are.
        momentum: of the running statistics: r ← m·r + (1 - m)·new.
        epsilon: ε.
        dtype: of the result.
        axis_name: the mapped axis over which the statistics are averaged, if any.
        two_pass: σ² as E[(x - E x)²] instead of E[x²] - (E x)², and Flax's form. For maps of few
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
            y = (wide - centre) * slope + bias
        else:
            y = wide * slope + (bias - centre * slope)
        return y.astype(self.dtype)

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
