"""SegFormer's head: every map to one width, enlarged to the finest, joined by a 1×1 convolution.

Xie et al. 2021 (https://arxiv.org/abs/2105.15203), in Hugging Face's form.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dilaff_jax.models import layers, transformer


class SegFormer(nn.Module):
    """Scores at the stride of the finest features.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        width: channels of each map and of their sum; the paper's are 256 for MiT-B0 and B1, else
            768.
        dropout: rate before the classifier.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    width: int = 256
    dropout: float = 0.1

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        brought = [
            transformer.dense(self.width, self.style, f"linear_{i}")(y)
            for i, y in enumerate(features)
        ]
        fuse = layers.ConvNorm(self.width, style=self.style, name="fuse")
        # Coarse to fine, as the published weights have them.
        x = fuse(brought[::-1], train, size=features[0].shape[1:3])
        y = layers.Dropout(self.dropout, self.style)(x, train)
        return layers.classifier(self.num_classes, self.style)(y), x

    # Where encoder and decoder stand in a file.
    torch_parts = (("encoder", "segformer."), ("decoder", "decode_head."))

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in Hugging Face's files."""
        return (
            (r"^linear_(\d+)\b", r"linear_c.\1.proj"),
            (r"^fuse/conv\b", "linear_fuse"),
            (r"^fuse/norm\b", "batch_norm"),
            (r"^logits\b", "classifier"),
        )


VARIANTS = {"segformer": SegFormer}
