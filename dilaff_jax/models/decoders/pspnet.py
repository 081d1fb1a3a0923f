"""PSPNet: means over grids of several sizes tell each pixel what surrounds it.

Zhao et al. 2017 (https://arxiv.org/abs/1612.01105).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dilaff_jax.models import layers


class PSPNet(nn.Module):
    """Pyramid of adaptive means joined with the last feature map; 3×3; classifier.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        bins: sizes of the grids.
        width: channels of each level of the pyramid and of the 3×3 convolution.
        dropout: rate before the classifier.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    bins: tuple[int, ...] = (1, 2, 3, 6)
    width: int = 512
    dropout: float = 0.1

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        levels = pyramid(features[-1], self.bins, self.width, self.style, train)
        x = layers.ConvNorm(self.width, 3, style=self.style, name="conv")(levels, train)
        y = layers.Dropout(self.dropout, self.style)(x, train)
        return layers.classifier(self.num_classes, self.style)(y), x

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: torchvision has no PSPNet; paths are joined by dots."""
        return ()


def pyramid(
    x: jax.Array, bins: Sequence[int], width: int, style: layers.Style, train: bool
) -> list[jax.Array]:
    """`x` `[B, h, w, C]` and, for each of `bins`, its means in `width` channels at that size.

    To be called within a module, whose layers `bin_1` etc. become.
    """
    levels = [x]
    for size in bins:
        level = layers.adaptive_average_pool(x, size)
        # Of so few pixels the batch statistics are often close together.
        conv = layers.ConvNorm(width, two_pass=True, style=style, name=f"bin_{size}")
        levels.append(layers.resize_to(conv(level, train), x.shape[1:3]))
    return levels


VARIANTS = {"pspnet": PSPNet}
