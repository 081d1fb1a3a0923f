"""What transformers are made of besides `layers`: dense layers, LayerNorm, attention, DropPath."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.models import dispatch, layers

# Attention scores of more bytes than this are made and used in parts.
SCORE_BYTES = 2**26
# Those of fewer bytes than this are kept for the backward pass.
KEPT_BYTES = 2**22
# On a GPU, scores of fewer bytes stay in its cache, and the fused kernel is the slower one: on an
# H200 three times so at 17 MB (the few keys of a SegFormer), and three times as fast at 90 MB.
CACHED_BYTES = 2**25

_INIT = nn.initializers.truncated_normal(stddev=0.02)

gelu = functools.partial(nn.gelu, approximate=False)


def dense(features: int, style: layers.Style, name: str, *, bias: bool = True) -> nn.Dense:
    """A linear layer over the channels; it begins as N(0, 0.02), cut at 2σ."""
    return nn.Dense(features, use_bias=bias, dtype=style.dtype, kernel_init=_INIT, name=name)


def layer_norm(style: layers.Style, name: str, epsilon: float) -> nn.LayerNorm:
    """LayerNorm over the channels.

    Its variance takes two passes: residual streams of pretrained transformers have channels whose
    mean is hundreds of times their spread.
    """
    return nn.LayerNorm(epsilon, dtype=style.dtype, use_fast_variance=False, name=name)


def conv(
    features: int,
    kernel: int,
    style: layers.Style,
    name: str,
    *,
    stride: int = 1,
    padding: Any = "VALID",
    depthwise: bool = False,
) -> nn.Conv:
    """A convolution with bias: patches, and the depthwise ones between dense layers."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        feature_group_count=features if depthwise else 1,
        dtype=style.dtype,
        kernel_init=_INIT,
        conv_general_dilated=layers.own_conv(depthwise, style),
        name=name,
    )


def at_least(x: jax.Array, window: int) -> jax.Array:
    """`[B, H, W, C]`, with zeros below and to the right where it is smaller than the window.

    torch fails there; of larger maps it leaves out what fills no window, and so do we.
    """
    short = [max(0, window - n) if isinstance(n, int) else 0 for n in x.shape[1:3]]
    return jnp.pad(x, [(0, 0), (0, short[0]), (0, short[1]), (0, 0)]) if any(short) else x


class DropPath(nn.Module):
    """Stochastic depth: in training a residual branch is left out for a share of the images.

    Huang et al. 2016 (https://arxiv.org/abs/1603.09382). Drawn for each image as in
    `layers.Dropout`; needs the "dropout" random stream.
    """

    rate: float
    style: layers.Style = layers.Style()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, ...]`: 0 for a share `rate` of the images, the rest divided by 1 - rate."""
        if not train or self.rate == 0:
            return x
        shape = (1,) * (x.ndim - 1)
        return layers.drop(x, self.make_rng("dropout"), self.rate, shape, self.style)


def drop_rates(highest: float, blocks: int) -> list[float]:
    """Rates of `DropPath`, rising evenly from 0 at the first block to `highest` at the last."""
    return [highest * i / max(blocks - 1, 1) for i in range(blocks)]


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√d)·v of every head.

    On a GPU in bfloat16 by cuDNN's fused kernel, which never holds the scores, where they are more
    than `CACHED_BYTES`. Elsewhere in parts of the queries, so that the scores of one part take
    `SCORE_BYTES` at most. Nor are more than `KEPT_BYTES` kept for the backward pass, which computes
    them again: memory grows with the image, not with its square.

    Args:
        query: `[B, N, heads, d]`.
        key: `[B, M, heads, d]`.
        value: `[B, M, heads, d]`.

    Returns:
        `[B, N, heads, d]`.
    """
    batch, length, heads, width = query.shape
    if not all(isinstance(n, int) for n in (batch, length, key.shape[1])):
        return _attend(query, key, value)  # an image of any size: its parts cannot be counted
    scores = 4 * batch * heads * length * key.shape[1]
    if dispatch.target() == "gpu" and query.dtype == jnp.bfloat16 and scores > CACHED_BYTES:
        return _fused(query, key, value)
    if scores <= KEPT_BYTES:
        return _attend(query, key, value)
    parts = math.ceil(scores / SCORE_BYTES)
    if parts <= 1:
        return jax.checkpoint(_attend)(query, key, value)
    rows = -(-length // parts)
    parts = -(-length // rows)
    padded = jnp.pad(query, [(0, 0), (0, parts * rows - length), (0, 0), (0, 0)])
    split = jnp.moveaxis(padded.reshape(batch, parts, rows, heads, width), 1, 0)
    result = jax.lax.map(jax.checkpoint(lambda q: _attend(q, key, value)), split)
    return jnp.moveaxis(result, 0, 1).reshape(batch, parts * rows, heads, width)[:, :length]


def _fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """By cuDNN, whose backward pass takes an even number of queries and of keys."""
    length, keys = query.shape[1], key.shape[1]
    query, key, value = (
        jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value)
    )
    seen = jnp.full(query.shape[:1], keys, jnp.int32) if keys % 2 else None
    fused = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=seen, implementation="cudnn"
    )
    return fused[:, :length]


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")
