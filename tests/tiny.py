"""A network that compiles in a second, plugged in by name as anybody's own would be."""

import flax.linen as nn
import jax.numpy as jnp

from dilaff_jax.models import layers
from dilaff_jax.models.decoders import fcn


class TinyEncoder(nn.Module):
    """Three convolutions, stride 8 at the end; `config.model.encoder = "tests.tiny:TinyEncoder"`."""

    style: layers.Style = layers.Style()
    output_stride: int = 8
    width: int = 8
    mean: tuple = (124.0, 116.0, 104.0)
    std: tuple = (58.0, 57.0, 57.0)

    @nn.compact
    def __call__(self, x, train):
        features = []
        for i in range(3):
            x = layers.ConvNorm(self.width, 3, stride=2, style=self.style, name=f"conv{i}")(
                x, train
            )
            features.append(x)
        return [*features, features[-1], features[-1]]

    @property
    def torch_keys(self):
        return ()


class FaultyDecoder(fcn.FCN):
    """A decoder of somebody's own that has a fault: `config.model.decoder = "tests.tiny:..."`."""

    @nn.compact
    def __call__(self, features, train):
        return jnp.einsum("bhwc,cd->bhwd", features[-1], jnp.zeros((3, 4))), features[-1]


def model_config(config, **changes):
    """Makes `config.model` tiny: an FCN at stride 8, an affinity head of width 8 at stride 4."""
    config.model.update(
        {
            "encoder": "tests.tiny:TinyEncoder",
            "output_stride": 8,
            "decoder": "fcn",
            "decoder_options": {"dropout": 0.1},
            "affinity": {"width": 8, "rates": (1,), "dilations": (1, 2), "sources": ("stride4",)},
        }
    )
    for key, value in changes.items():
        with config.model.ignore_type():
            config.model[key] = value
    return config
