"""DeepLabv3+: ASPP joined with stride-4 features.

Chen et al. 2018 (https://arxiv.org/abs/1802.02611). `separable=True` is the paper's cheaper form.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.models import layers
from dilaff_jax.models.decoders import deeplabv3


class DeepLabV3Plus(nn.Module):
    """ASPP, enlarged to stride 4, joined with 1×1-projected features there; two 3×3; classifier.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        output_stride: of the encoder; chooses the rates from `deeplabv3.RATES`.
        rates: the ASPP's dilations, where that does not serve.
        width: channels of the ASPP and of the two convolutions.
        low_level: channels to which the stride-4 features are projected.
        separable: 3×3 convolutions are depthwise separable, in the ASPP too.
        dropout: rate after the ASPP; 0.1 as in the authors' code.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    output_stride: int = 16
    rates: tuple[int, ...] | None = None
    width: int = 256
    low_level: int = 48
    separable: bool = False
    dropout: float = 0.1

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        aspp = deeplabv3.ASPP(
            deeplabv3.rates_for(self.output_stride, self.rates),
            self.width,
            self.dropout,
            self.separable,
            self.style,
            name="aspp",
        )
        x = aspp(features[-1], train)
        project = layers.ConvNorm(self.low_level, style=self.style, name="low_level")
        low = project(features[1], train)
        x = jnp.concatenate([layers.resize_to(x, low.shape[1:3]), low], axis=-1)
        conv = layers.SeparableConvNorm if self.separable else layers.ConvNorm
        for i in range(2):
            x = conv(self.width, kernel=3, style=self.style, name=f"conv_{i}")(x, train)
        return layers.classifier(self.num_classes, self.style)(x), x

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: torchvision has no DeepLabv3+; paths are joined by dots."""
        return ()


VARIANTS = {"deeplabv3plus": DeepLabV3Plus}
