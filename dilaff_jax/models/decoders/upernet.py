"""UPerNet: PSPNet's pyramid on the coarsest map, then finer and finer ones added from the top.

Xiao et al. 2018 (https://arxiv.org/abs/1807.10221), in mmsegmentation's and Hugging Face's form.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers
from dilaff_jax.models.decoders import pspnet


class UPerNet(nn.Module):
    """Scores at the stride of the finest features.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        width: channels.
        bins: sizes of the pyramid's grids.
        scales: for features that are all of one stride, as a plain transformer's: by how much each
            is enlarged (bilinear, after a 1×1 convolution and before a 3×3 one, as in
            mmsegmentation's MultiLevelNeck), usually (4, 2, 1, 0.5). None: they are as they are.
        dropout: rate before the classifier.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    width: int = 512
    bins: tuple[int, ...] = (1, 2, 3, 6)
    scales: tuple[int | float, ...] | None = None
    dropout: float = 0.1

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        conv = functools.partial(layers.ConvNorm, self.width, style=self.style)
        if self.scales is not None:
            features = self._rescaled(features, train)
        pooled = pspnet.pyramid(features[-1], self.bins, self.width, self.style, train)
        maps = [conv(kernel=3, name="bottleneck")(pooled, train)]
        for i, feature in reversed(list(enumerate(features[:-1]))):
            size = feature.shape[1:3]
            x = conv(name=f"lateral_{i}")(feature, train) + layers.resize_to(maps[0], size)
            maps.insert(0, x)
        size = features[0].shape[1:3]
        last = len(maps) - 1
        maps = [
            y if i == last else conv(kernel=3, name=f"fpn_{i}")(y, train)
            for i, y in enumerate(maps)
        ]
        x = conv(kernel=3, name="fpn_bottleneck")([layers.resize_to(y, size) for y in maps], train)
        y = layers.Dropout(self.dropout, self.style)(x, train)
        return layers.classifier(self.num_classes, self.style)(y), x

    def _rescaled(self, features: Sequence[jax.Array], train: bool) -> list[jax.Array]:
        scales = self.scales or ()
        if len(scales) != len(features):
            raise UserError(
                f"decoder_options.scales are {scales}; expected {len(features)} numbers, one for "
                "each map of the encoder"
            )
        rescaled = []
        for i, (x, scale) in enumerate(zip(features, scales, strict=True)):
            conv = functools.partial(layers.ConvNorm, x.shape[-1], style=self.style)
            x = conv(name=f"neck_{i}_in")(x, train)
            x = layers.resize_to(x, [max(1, int(n * scale)) for n in x.shape[1:3]])
            rescaled.append(conv(kernel=3, name=f"neck_{i}_out")(x, train))
        return rescaled

    # Where the parts stand in a file, and the layers of the auxiliary head.
    torch_parts = (("decoder", "decode_head."), ("aux_head", "auxiliary_head."))
    aux_torch_keys = (
        (r"^conv/conv\b", "convs.0.conv"),
        (r"^conv/norm\b", "convs.0.batch_norm"),
        (r"^logits\b", "classifier"),
    )

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in Hugging Face's files."""
        pooled = tuple(
            (rf"^bin_{size}/", f"psp_modules.{i}.1/") for i, size in enumerate(self.bins)
        )
        return (
            *pooled,
            (r"^lateral_(\d+)/", r"lateral_convs.\1/"),
            (r"^fpn_(\d+)/", r"fpn_convs.\1/"),
            (r"/norm\b", "/batch_norm"),
            (r"^logits\b", "classifier"),
        )


VARIANTS = {"upernet": UPerNet}
