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
        deep_supervision: also score the steps before the last, for `loss.deep` (Dou et al. 2017,
            https://doi.org/10.1016/j.media.2017.05.001; as nnU-Net does).
    """

    num_classes: int
    style: layers.Style = layers.Style()
    widths: tuple[int, ...] = (256, 128, 64, 32)
    dropout: float = 0.1
    deep_supervision: bool = False

    ndims: ClassVar[tuple[int, ...]] = (2, 3)

    @nn.compact
    def __call__(
        self, features: Sequence[jax.Array], train: bool
    ) -> tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from.

        With `deep_supervision` also the scores of the steps before the last, the finest first.
        """
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
        if self.deep_supervision and len(self.widths) < 2:
            raise UserError(
                f"deep_supervision scores the steps before the last, and widths are {self.widths}; "
                "give two or more, or leave it out"
            )
        x, steps = features[-1], []
        # Not strict: fewer widths than finer features stop at a coarser stride.
        for i, (skip, width) in enumerate(zip(features[-2::-1], self.widths, strict=False)):
            conv = functools.partial(layers.ConvNorm, width, 3, style=self.style)
            joined = [layers.resize_to(x, skip.shape[1:-1]), skip]
            x = conv(name=f"up{i}_conv0")(joined, train)
            x = conv(name=f"up{i}_conv1")(x, train)
            steps.append(x)
        y = layers.Dropout(self.dropout, self.style)(x, train)
        scores = layers.classifier(self.num_classes, self.style)(y)
        if not self.deep_supervision:
            return scores, x
        deep = [
            layers.classifier(self.num_classes, self.style, name=f"logits{i}")(step)
            for i, step in enumerate(steps[:-1])
        ]
        return scores, x, tuple(deep[::-1])

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: torchvision has no U-Net; paths are joined by dots."""
        return ()


VARIANTS = {"unet": UNet}
