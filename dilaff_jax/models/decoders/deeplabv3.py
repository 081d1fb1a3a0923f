"""DeepLabv3: atrous spatial pyramid pooling.

Chen et al. 2017 (https://arxiv.org/abs/1706.05587), in torchvision's form.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.models import layers

# The paper's rates at output stride 16, doubled at 8.
RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}


def rates_for(output_stride: int, rates: Sequence[int] | None) -> tuple[int, ...]:
    """The rates asked for, or those that belong to the output stride."""
    return RATES[output_stride] if rates is None else tuple(rates)


class ASPP(nn.Module):
    """1×1, one 3×3 convolution a rate, and the mean of the image; joined, projected, dropped out.

    Attributes:
        rates: dilations of the 3×3 convolutions.
        width: channels of each branch and of the result.
        dropout: rate after the projection.
        separable: the 3×3 convolutions are depthwise separable.
        style: see `layers.Style`.
    """

    rates: tuple[int, ...]
    width: int
    dropout: float
    separable: bool
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to `[B, H, W, width]`."""
        conv = functools.partial(layers.ConvNorm, self.width, style=self.style)
        wide = layers.SeparableConvNorm if self.separable else layers.ConvNorm
        branches = [conv(name="branch_0")(x, train)]
        for i, rate in enumerate(self.rates, start=1):
            atrous = wide(self.width, kernel=3, dilation=rate, style=self.style, name=f"branch_{i}")
            branches.append(atrous(x, train))
        mean = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        # Its batch statistics come from one value an image, often close together.
        pooled = conv(two_pass=True, name="pool")(mean, train)
        x = conv(name="project")([*branches, pooled], train)
        return layers.Dropout(self.dropout, self.style)(x, train)


class DeepLabV3(nn.Module):
    """ASPP, a 3×3 convolution, classifier; at the stride of the last feature map.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        output_stride: of the encoder; chooses the rates from `RATES`.
        rates: the dilations, where `RATES` does not serve; () for none, as in the mobile DeepLab.
        width: channels.
        dropout: rate after the ASPP.
        head: have the 3×3 convolution; the mobile DeepLab has none.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    output_stride: int = 8
    rates: tuple[int, ...] | None = None
    width: int = 256
    dropout: float = 0.5
    head: bool = True

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        aspp = ASPP(
            rates_for(self.output_stride, self.rates),
            self.width,
            self.dropout,
            separable=False,
            style=self.style,
            name="aspp",
        )
        x = aspp(features[-1], train)
        if self.head:
            x = layers.ConvNorm(self.width, 3, style=self.style, name="conv")(x, train)
        return layers.classifier(self.num_classes, self.style)(x), x

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to torchvision's names."""
        pool = 1 + len(rates_for(self.output_stride, self.rates))
        return (
            (r"^aspp$", "0"),
            (r"^aspp/branch_(\d+)/conv\b", r"0.convs.\1.0"),
            (r"^aspp/branch_(\d+)/norm\b", r"0.convs.\1.1"),
            (r"^aspp/pool/conv\b", f"0.convs.{pool}.1"),
            (r"^aspp/pool/norm\b", f"0.convs.{pool}.2"),
            (r"^aspp/project/conv\b", "0.project.0"),
            (r"^aspp/project/norm\b", "0.project.1"),
            (r"^conv/conv\b", "1"),
            (r"^conv/norm\b", "2"),
            (r"^logits\b", "4"),
        )


VARIANTS = {"deeplabv3": DeepLabV3}
