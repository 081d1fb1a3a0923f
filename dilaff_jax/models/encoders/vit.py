"""Vision transformers in DINOv2's and DINOv3's form.

Oquab et al. 2023 (https://arxiv.org/abs/2304.07193): patches of 14 pixels, learned positions,
LayerScale; registers after Darcet et al. (https://arxiv.org/abs/2309.16588). Siméoni et al. 2025
(https://arxiv.org/abs/2508.10104): patches of 16 pixels, rotary positions on both axes, registers.
Equal to Hugging Face's, see `interop.parity`.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax import resize
from dilaff_jax.errors import UserError
from dilaff_jax.models import dispatch, layers, transformer

# Of the rotary positions: the base of their wavelengths.
_ROPE_BASE = 100.0


def rope(height: int, width: int, head: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[height·width, head]` of each patch's rotary angles.

    2π·y·100^(-4i/head) for i < head/4, the same of x, and both again, where (y, x) are the centres
    of patches in [-1, 1] of the image (DINOv3's `rope_embed`).
    """
    periods = _ROPE_BASE ** jnp.arange(0, 1, 4 / head, dtype=jnp.float32)
    y, x = ((2 * jnp.arange(n) + 1) / n - 1.0 for n in (height, width))
    places = jnp.stack(jnp.broadcast_arrays(y[:, None], x[None, :]), axis=-1)
    angles = 2 * math.pi * places.reshape(-1, 2, 1) / periods
    angles = jnp.tile(angles.reshape(height * width, head // 2), 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns the last tokens of `[B, N, heads, d]`, as many as there are angles, by `rope`'s."""
    first = x.shape[1] - cosine.shape[0]
    kept, patches = x[:, :first], x[:, first:]
    low, high = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
    half = jnp.concatenate([-high, low], axis=-1)
    turned = patches * cosine[:, None] + half * sine[:, None]
    return jnp.concatenate([kept, turned.astype(x.dtype)], axis=1)


class Attention(nn.Module):
    """Attention of all tokens to all, rotated where there are angles."""

    heads: int
    key_bias: bool
    style: layers.Style

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """`[B, N, C]` to the same."""
        batch, length, channels = x.shape
        parts = []
        for name in ("query", "key", "value"):
            bias = name != "key" or self.key_bias
            y = transformer.dense(channels, self.style, name, bias=bias)(x)
            parts.append(y.reshape(batch, length, self.heads, channels // self.heads))
        if angles is not None:
            parts[:2] = [rotate(y, *angles) for y in parts[:2]]
        attended = transformer.attend(*parts).reshape(batch, length, channels)
        return transformer.dense(channels, self.style, "dense")(attended)


class MLP(nn.Module):
    """Dense, GELU, dense; gated: (silu(gate) · dense), dense.

    `joined`: gate and dense are one layer, as in DINOv2.
    """

    hidden: int
    gated: bool
    joined: bool
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` to the same."""
        dense = functools.partial(transformer.dense, style=self.style)
        if not self.gated:
            y = transformer.gelu(dense(self.hidden, name="fc1")(x))
        elif self.joined:
            gate, y = jnp.split(dense(2 * self.hidden, name="weights_in")(x), 2, axis=-1)
            y = nn.silu(gate) * y
        else:
            gate = dense(self.hidden, name="gate")(x)
            y = nn.silu(gate) * dense(self.hidden, name="fc1")(x)
        name = "weights_out" if self.gated and self.joined else "fc2"
        return dense(x.shape[-1], name=name)(y)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, scaled, and beside a shortcut."""

    heads: int
    hidden: int
    gated: bool
    rotary: bool
    drop_path: float
    epsilon: float
    style: layers.Style

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, angles: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """`[B, N, C]` to the same."""
        norm = functools.partial(transformer.layer_norm, self.style, epsilon=self.epsilon)
        drop = transformer.DropPath(self.drop_path, self.style)
        attention = Attention(self.heads, not self.rotary, self.style, name="attention")
        mlp = MLP(self.hidden, self.gated, not self.rotary, self.style, name="mlp")
        x = x + drop(self._scaled(attention(norm("norm1")(x), angles), "scale1"), train)
        return x + drop(self._scaled(mlp(norm("norm2")(x)), "scale2"), train)

    def _scaled(self, x: jax.Array, name: str) -> jax.Array:
        return x * self.param(name, nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)


class ViT(nn.Module):
    """Normalised images `[B, H, W, 3]` to maps of patches, one for each of `blocks`.

    All are of the patches' stride; an image that they do not divide gets zeros on all sides, as in
    DINOv2's segmentation. Learned positions are resampled to any grid, bicubic as in Hugging Face.

    Attributes:
        width: channels.
        depth: blocks.
        heads: attention heads.
        hidden: channels within the MLP.
        gated: its form (SwiGLU).
        patch: pixels of a patch's side.
        registers: tokens besides the class token that stand for no patch.
        rotary: positions by rotation as in DINOv3, else learned as in DINOv2.
        grid: patches on each side of the image whose positions were learned.
        blocks: numbers of the blocks whose maps are returned, normalised; None for the last four.
        style: see `layers.Style`.
        output_stride: 16, which stands for the patches' stride.
        drop_path: highest rate of stochastic depth.
        epsilon: of LayerNorms.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    gated: bool = False
    patch: int = 14
    registers: int = 0
    rotary: bool = False
    grid: int = 37
    blocks: tuple[int, ...] | None = None
    style: layers.Style = layers.Style()
    output_stride: int = 16
    drop_path: float = 0.0
    epsilon: float = 1e-6
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD
    # What the files have besides: it stands for patches that are hidden in pretraining.
    unused = ("embeddings.mask_token", "classifier.*")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the maps `[B, ⌈H/patch⌉, ⌈W/patch⌉, width]`, in the order of `blocks`."""
        layers.check_choice("output_stride", self.output_stride, (16,))
        wanted = self._blocks()
        # "SAME" with stride = window: as much on both sides, the odd pixel at the end.
        x = transformer.conv(
            self.width, self.patch, self.style, "patch", stride=self.patch, padding="SAME"
        )(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height * width, channels)
        token = functools.partial(self._tokens, batch)
        angles = None
        if self.rotary:
            angles = rope(height, width, channels // self.heads)
            x = jnp.concatenate([token("cls_token", 1), x], axis=1)
        else:
            x = jnp.concatenate([token("cls_token", 1), x], axis=1)
            x = x + self._positions(height, width).astype(x.dtype)
        if self.registers:
            registers = token("register_tokens", self.registers)
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        block = nn.remat(Block, static_argnums=(2,)) if self.style.remat else Block
        norm = transformer.layer_norm(self.style, "norm", self.epsilon)
        rates = transformer.drop_rates(self.drop_path, self.depth)
        maps = {}
        for i in range(max(wanted) + 1):
            options = (self.heads, self.hidden, self.gated, self.rotary, rates[i], self.epsilon)
            x = block(*options, self.style, name=f"block_{i}")(x, train, angles)
            if train:
                x = dispatch.materialize(x)
            if i in wanted:
                patches = norm(x)[:, 1 + self.registers :]
                maps[i] = patches.reshape(batch, height, width, channels)
        return tuple(maps[i] for i in wanted)

    def _blocks(self) -> tuple[int, ...]:
        chosen = self.blocks
        if chosen is None:
            return tuple(range(max(0, self.depth - 4), self.depth))
        if not chosen or max(chosen) >= self.depth or list(chosen) != sorted(set(chosen)):
            raise UserError(
                f"encoder_options.blocks are {chosen}; expected numbers of blocks, rising, the "
                f"first is 0 and the last {self.depth - 1}"
            )
        return chosen

    def _tokens(self, batch: int, name: str, count: int) -> jax.Array:
        init = nn.initializers.truncated_normal(0.02)
        tokens = self.param(name, init, (1, count, self.width)).astype(self.style.dtype)
        return jnp.broadcast_to(tokens, (batch, count, self.width))

    def _positions(self, height: int, width: int) -> jax.Array:
        """`[1, 1 + height·width, C]`, the class token's first."""
        init, grid = nn.initializers.truncated_normal(0.02), self.grid
        learned = self.param("position_embeddings", init, (1, 1 + grid * grid, self.width))
        # DINOv2's models with registers were trained with antialiasing, those without without.
        patches = resize.bicubic(
            learned[:, 1:].reshape(1, grid, grid, self.width),
            (height, width),
            antialias=self.registers > 0,
        )
        flat = patches.reshape(1, height * width, self.width)
        return jnp.concatenate([learned[:, :1], flat], axis=1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps."""
        return (self.patch,) * len(self._blocks())

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Modules and tokens from the image on, for learning rates that fall towards it."""
        first = ("patch", "cls_token", "register_tokens", "position_embeddings")
        return (first, *((f"block_{i}",) for i in range(self.depth)))

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in Hugging Face's files."""
        shared = (
            (r"^(cls_token|register_tokens|position_embeddings)$", r"embeddings.\1"),
            (r"/scale(\d)$", r".layer_scale\1.lambda1"),
        )
        if self.rotary:
            short = {"query": "q", "key": "k", "value": "v", "dense": "o"}
            return (
                *shared,
                (r"^patch\b", "embeddings.patch_embeddings"),
                (r"^block_(\d+)", r"layer.\1"),
                *((f"attention/{name}", f"attention.{s}_proj") for name, s in short.items()),
                ("mlp/gate", "mlp.gate_proj"),
                ("mlp/fc1", "mlp.up_proj"),
                ("mlp/fc2", "mlp.down_proj"),
            )
        return (
            *shared,
            (r"^patch\b", "embeddings.patch_embeddings.projection"),
            (r"^norm\b", "layernorm"),
            (r"^block_(\d+)", r"encoder.layer.\1"),
            (r"attention/(query|key|value)\b", r"attention.attention.\1"),
            ("attention/dense", "attention.output.dense"),
        )


_SIZES: dict[str, dict[str, Any]] = {
    "s": {"width": 384, "depth": 12, "heads": 6, "hidden": 1536},
    "b": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "l": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "g": {"width": 1536, "depth": 40, "heads": 24, "hidden": 4096, "gated": True},
    "splus": {"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "gated": True},
    "hplus": {"width": 1280, "depth": 32, "heads": 20, "hidden": 5120, "gated": True},
}
_DINOV3 = functools.partial(ViT, patch=16, registers=4, rotary=True, epsilon=1e-5)
VARIANTS = {
    **{f"dinov2_vit{s}14": functools.partial(ViT, **_SIZES[s]) for s in ("s", "b", "l", "g")},
    **{
        f"dinov2_vit{s}14_reg": functools.partial(ViT, **_SIZES[s], registers=4)
        for s in ("s", "b", "l", "g")
    },
    **{
        f"dinov3_vit{s}16{plus}": functools.partial(_DINOV3, **_SIZES[s + plus])
        for s, plus in (("s", ""), ("s", "plus"), ("b", ""), ("l", ""), ("h", "plus"))
    },
}
