"""ConvNeXt: a ResNet's plan with a transformer's parts, 7×7 depthwise convolutions for attention.

Liu et al. 2022 (https://arxiv.org/abs/2201.03545). Equal to Hugging Face's, see `interop.parity`.
"""

import functools

import flax.linen as nn
import jax

from dilaff_jax.models import dispatch, layers, transformer

_EPSILON = 1e-6


class Block(nn.Module):
    """7×7 depthwise convolution, LayerNorm, dense to four times the width, GELU, back; scaled."""

    drop_path: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to the same."""
        width, reach = x.shape[-1], ((3, 3), (3, 3))
        y = transformer.conv(width, 7, self.style, "dwconv", padding=reach, depthwise=True)(x)
        y = transformer.layer_norm(self.style, "norm", _EPSILON)(y)
        y = transformer.gelu(transformer.dense(4 * width, self.style, "pwconv1")(y))
        y = transformer.dense(width, self.style, "pwconv2")(y)
        scale = self.param("layer_scale_parameter", nn.initializers.constant(1e-6), (width,))
        y = y * scale.astype(self.style.dtype)
        return x + transformer.DropPath(self.drop_path, self.style)(y, train)


class ConvNeXt(nn.Module):
    """Normalised images `[B, H, W, 3]` to features of stride 4, 8, 16, 32, each normalised.

    Rows and columns that fill no patch of 4×4, or no pair between stages, are left out as in torch.

    Attributes:
        widths: channels of the four stages.
        depths: blocks in each.
        style: see `layers.Style`.
        output_stride: 32, there is no other.
        drop_path: highest rate of stochastic depth.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    style: layers.Style = layers.Style()
    output_stride: int = 32
    drop_path: float = 0.0
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD
    strides = (4, 8, 16, 32)
    # What a file of an ImageNet network has besides, and what it has not.
    unused = ("layernorm.*", "classifier.*", "head.*")
    fresh = ("hidden_states_norms.*",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the features, finest first."""
        layers.check_choice("output_stride", self.output_stride, (32,))
        rates = iter(transformer.drop_rates(self.drop_path, sum(self.depths)))
        block = nn.remat(Block, static_argnums=(2,)) if self.style.remat else Block
        norm = functools.partial(transformer.layer_norm, self.style, epsilon=_EPSILON)
        features = []
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            size = 4 if i == 0 else 2
            down = transformer.conv(width, size, self.style, f"down_{i}", stride=size)
            if i == 0:
                x = norm("stem_norm")(down(transformer.at_least(x, size)))
            else:
                x = down(transformer.at_least(norm(f"down_norm_{i}")(x), size))
            for j in range(depth):
                x = block(next(rates), self.style, name=f"block_{i}_{j}")(x, train)
                if train:  # or every block of a stage would compute all before it again
                    x = dispatch.materialize(x)
            features.append(norm(f"norm_{i}")(x))
        return tuple(features)

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Modules from the image on, for learning rates that fall towards it."""
        groups: list[tuple[str, ...]] = []
        for i, depth in enumerate(self.depths):
            groups.append((f"down_{i}", "stem_norm" if i == 0 else f"down_norm_{i}"))
            groups += [(f"block_{i}_{j}",) for j in range(depth)]
        return tuple(groups)

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in Hugging Face's files."""
        stages = tuple((rf"^norm_{i}\b", f"hidden_states_norms.stage{i + 1}") for i in range(4))
        return (
            *stages,
            (r"^down_0\b", "embeddings.patch_embeddings"),
            (r"^stem_norm\b", "embeddings.layernorm"),
            (r"^down_norm_(\d)\b", r"encoder.stages.\1.downsampling_layer.0"),
            (r"^down_(\d)\b", r"encoder.stages.\1.downsampling_layer.1"),
            (r"^block_(\d)_(\d+)", r"encoder.stages.\1.layers.\2"),
            (r"/norm\b", ".layernorm"),
        )


VARIANTS = {
    "convnext_tiny": functools.partial(ConvNeXt),
    "convnext_small": functools.partial(ConvNeXt, depths=(3, 3, 27, 3)),
    "convnext_base": functools.partial(
        ConvNeXt, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)
    ),
    "convnext_large": functools.partial(
        ConvNeXt, depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)
    ),
}
