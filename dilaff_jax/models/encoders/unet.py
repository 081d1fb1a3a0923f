"""The contracting half of a U-Net: two convolutions at each scale, from full resolution on.

Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), with padded convolutions, and each
halving by the stride of a convolution as in nnU-Net (https://arxiv.org/abs/1809.10486), where the
paper pools. The decoder `unet` is the other half. For those who have no pretrained weights: a few
hundred thousand parameters train in minutes on a CPU.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers


class UNet(nn.Module):
    """Normalised images `[B, H, W, 3]` or volumes to features of nominal stride 1, 2, 4, 8, ...

    Beyond `output_stride` a scale dilates instead of striding, as in `resnet.ResNet`.

    Attributes:
        widths: channels of each scale, finest first; as many scales as there are widths.
        style: see `layers.Style`.
        output_stride: 8, 16 or 32.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    style: layers.Style = layers.Style()
    output_stride: int = 32
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD

    ndims: ClassVar[tuple[int, ...]] = (2, 3)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the features, finest first."""
        layers.check_choice("output_stride", self.output_stride, (8, 16, 32))
        if not self.widths:
            raise UserError("encoder_options.widths are (); give one or more, such as (32, 64)")
        scale = Scale
        if self.style.remat:
            scale = nn.remat(Scale, static_argnums=(2,))
        features: list[jax.Array] = []
        reached, dilation = 1, 1
        for i, width in enumerate(self.widths):
            stride = 2 if features and 2 * reached <= self.output_stride else 1
            before = dilation
            if features and stride == 1:
                dilation *= 2
            reached *= stride
            x = scale(width, stride, before, dilation, self.style, name=f"scale_{i}")(x, train)
            features.append(x)
        return tuple(features)

    @property
    def strides(self) -> tuple[int, ...]:
        """Nominal, of the features."""
        return tuple(2**i for i in range(len(self.widths)))

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: torchvision has no U-Net; paths are joined by dots."""
        return ()


class Scale(nn.Module):
    """Two convolutions of three pixels a side; the first strides or has the dilation before."""

    width: int
    stride: int
    before: int
    dilation: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, *spatial, C]` to `[B, *spatial/stride, width]`."""
        conv = functools.partial(layers.ConvNorm, self.width, 3, style=self.style)
        x = conv(stride=self.stride, dilation=self.before, name="conv0")(x, train)
        return conv(dilation=self.dilation, name="conv1")(x, train)


VARIANTS = {"unet": UNet}
