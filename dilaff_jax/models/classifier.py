"""ImageNet classification with an encoder, to check that its weights still say what they said."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.models import layers, segmenter


class Classifier(nn.Module):
    """Encoder, its 1×1 head where it has one, mean over the image, linear.

    Attributes:
        encoder: from `segmenter.build_encoder`.
        num_classes: rows of the last layer.
    """

    encoder: nn.Module
    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """RGB in [0, 255] `[B, H, W, 3]` to logits `[B, num_classes]`."""
        x = segmenter.normalise(images, self.encoder)
        x = self.encoder(x, train)[-1]
        if self.encoder.head_width:
            head = layers.ConvNorm(
                self.encoder.head_width,
                activation=nn.relu6,
                epsilon=self.encoder.epsilon,
                style=self.encoder.style,
                name="head",
            )
            x = head(x, train)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="fc")(x)
