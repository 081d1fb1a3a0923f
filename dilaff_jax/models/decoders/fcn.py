"""FCN head: one 3×3 convolution, to a quarter of the channels if nothing is said; classifier.

Long et al. 2015 (https://arxiv.org/abs/1411.4038), in torchvision's form. It also serves as the
auxiliary head.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dilaff_jax.models import layers


class FCN(nn.Module):
    """Scores from the last feature map, at its stride.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        dropout: rate before the classifier.
        width: channels of the convolution; None for a quarter of those that come.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    dropout: float = 0.1
    width: int | None = None

    ndims: ClassVar[tuple[int, ...]] = (2, 3)

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        x = features[-1]
        width = self.width or x.shape[-1] // 4
        x = layers.ConvNorm(width, 3, style=self.style, name="conv")(x, train)
        y = layers.Dropout(self.dropout, self.style)(x, train)
        return layers.classifier(self.num_classes, self.style)(y), x

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to torchvision's names."""
        return ((r"^conv/conv\b", "0"), (r"^conv/norm\b", "1"), (r"^logits\b", "4"))


VARIANTS = {"fcn": FCN}
