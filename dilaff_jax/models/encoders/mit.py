"""MiT, SegFormer's encoder: overlapping patches, attention to a reduced map, a convolution inside.

Xie et al. 2021 (https://arxiv.org/abs/2105.15203). Equal to Hugging Face's, see `interop.parity`.
"""

import functools

import flax.linen as nn
import jax

from dilaff_jax.models import dispatch, layers, transformer


class Attention(nn.Module):
    """Every pixel attends to the map reduced by `reduction` on both axes."""

    heads: int
    reduction: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to the same."""
        batch, height, width, channels = x.shape
        dense = functools.partial(transformer.dense, channels, self.style)
        source = x
        if self.reduction > 1:
            size = self.reduction
            reduce = transformer.conv(channels, size, self.style, "sr", stride=size)
            source = reduce(transformer.at_least(x, size))
            source = transformer.layer_norm(self.style, "layer_norm", layers.EPSILON)(source)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, -1, self.heads, channels // self.heads)

        query, key, value = (
            heads(dense(name)(y)) for name, y in (("query", x), ("key", source), ("value", source))
        )
        attended = transformer.attend(query, key, value)
        return dense("dense")(attended.reshape(batch, height, width, channels))


class MixFFN(nn.Module):
    """Dense to four times the width, 3×3 depthwise convolution (it tells positions), GELU, back."""

    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to the same."""
        width = 4 * x.shape[-1]
        y = transformer.dense(width, self.style, "dense1")(x)
        reach = ((1, 1), (1, 1))
        y = transformer.conv(width, 3, self.style, "dwconv", padding=reach, depthwise=True)(y)
        return transformer.dense(x.shape[-1], self.style, "dense2")(transformer.gelu(y))


class Block(nn.Module):
    """Attention and Mix-FFN, each behind a LayerNorm and beside a shortcut."""

    heads: int
    reduction: int
    drop_path: float
    epsilon: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to the same."""
        norm = functools.partial(transformer.layer_norm, self.style, epsilon=self.epsilon)
        drop = transformer.DropPath(self.drop_path, self.style)
        y = Attention(self.heads, self.reduction, self.style, name="attention")(norm("norm1")(x))
        x = x + drop(y, train)
        return x + drop(MixFFN(self.style, name="mlp")(norm("norm2")(x)), train)


class MiT(nn.Module):
    """Normalised images `[B, H, W, 3]` to features of stride 4, 8, 16, 32.

    Attributes:
        widths: channels of the four stages.
        depths: blocks in each.
        heads: attention heads in each.
        reductions: of the map that is attended to in each.
        style: see `layers.Style`.
        output_stride: 32, there is no other.
        drop_path: highest rate of stochastic depth; SegFormer trains with 0.1.
        epsilon: of the blocks' LayerNorms: 1e-6, with which the published weights were trained;
            Hugging Face computes with 1e-5.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    widths: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    style: layers.Style = layers.Style()
    output_stride: int = 32
    drop_path: float = 0.0
    epsilon: float = 1e-6
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD
    strides = (4, 8, 16, 32)
    # What a file of an ImageNet network has besides.
    unused = ("classifier.*", "head.*")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the features, finest first."""
        layers.check_choice("output_stride", self.output_stride, (32,))
        rates = iter(transformer.drop_rates(self.drop_path, sum(self.depths)))
        block = nn.remat(Block, static_argnums=(2,)) if self.style.remat else Block
        norm = functools.partial(transformer.layer_norm, self.style)
        features = []
        plan = zip(self.widths, self.depths, self.heads, self.reductions, strict=True)
        for i, (width, depth, heads, reduction) in enumerate(plan):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            reach = (kernel // 2, kernel // 2)
            name = f"patch_embed_{i}"
            conv = transformer.conv(
                width, kernel, self.style, name, stride=stride, padding=(reach, reach)
            )
            x = norm(f"patch_norm_{i}", layers.EPSILON)(conv(x))
            for j in range(depth):
                name = f"block_{i}_{j}"
                make = block(heads, reduction, next(rates), self.epsilon, self.style, name=name)
                x = make(x, train)
                if train:  # or every block of a stage would compute all before it again
                    x = dispatch.materialize(x)
            x = norm(f"norm_{i}", self.epsilon)(x)
            features.append(x)
        return tuple(features)

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Modules from the image on, for learning rates that fall towards it."""
        groups: list[tuple[str, ...]] = []
        for i, depth in enumerate(self.depths):
            groups.append((f"patch_embed_{i}", f"patch_norm_{i}"))
            groups += [(f"block_{i}_{j}",) for j in range(depth)]
        return tuple(groups)

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in Hugging Face's files."""
        return (
            (r"^patch_embed_(\d)\b", r"encoder.patch_embeddings.\1.proj"),
            (r"^patch_norm_(\d)\b", r"encoder.patch_embeddings.\1.layer_norm"),
            (r"^norm_(\d)\b", r"encoder.layer_norm.\1"),
            (r"^block_(\d)_(\d+)", r"encoder.block.\1.\2"),
            (r"/norm(\d)\b", r".layer_norm_\1"),
            (r"attention/(query|key|value|sr|layer_norm)\b", r"attention.self.\1"),
            (r"attention/dense\b", "attention.output.dense"),
            (r"mlp/dwconv\b", "mlp.dwconv.dwconv"),
        )


VARIANTS = {
    "mit_b0": functools.partial(MiT, widths=(32, 64, 160, 256)),
    "mit_b1": functools.partial(MiT),
    "mit_b2": functools.partial(MiT, depths=(3, 4, 6, 3)),
    "mit_b3": functools.partial(MiT, depths=(3, 4, 18, 3)),
    "mit_b4": functools.partial(MiT, depths=(3, 8, 27, 3)),
    "mit_b5": functools.partial(MiT, depths=(3, 6, 40, 3)),
}
