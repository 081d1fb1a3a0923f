"""U-Net decoder over any encoder's features.

Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), with padded convolutions and bilinear
enlargement.
"""

import functools
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers


class UNet(nn.Module):
    """Enlarges, joins the next finer features, convolves twice; once for each width.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        widths: channels of each step, coarse to fine. Four reach stride 2, three stride 4.
        dropout: rate before the classifier.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    widths: tuple[int, ...] = (256, 128, 64, 32)
    dropout: float = 0.1

    ndims: ClassVar[tuple[int, ...]] = (2, 3)

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        if len(features) < 2:
            raise UserError(
                "the encoder gives one feature map, and the decoder 'unet' joins two or more; give "
                "the encoder more scales (encoder_options.widths)"
            )
        if not 1 <= len(self.widths) < len(features):
            raise UserError(
                f"widths are {self.widths}; the encoder has {len(features)} feature maps, so give "
                f"1 to {len(features) - 1} widths"
            )
        x = features[-1]
        # Not strict: fewer widths than finer features stop at a coarser stride.
        for i, (skip, width) in enumerate(zip(features[-2::-1], self.widths, strict=False)):
            conv = functools.partial(layers.ConvNorm, width, 3, style=self.style)
            joined = [layers.resize_to(x, skip.shape[1:-1]), skip]
            x = conv(name=f"up{i}_conv0")(joined, train)
            x = conv(name=f"up{i}_conv1")(x, train)
        y = layers.Dropout(self.dropout, self.style)(x, train)
        return layers.classifier(self.num_classes, self.style)(y), x

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: torchvision has no U-Net; paths are joined by dots."""
        return ()


VARIANTS = {"unet": UNet}
