"""Every key of a config and its default; other configs derive from this one.

A config is the experiment: `python -m dilaff_jax.main --config configs/NAME.py --workdir DIR`, any
key changed by `--config.optim.learning_rate=0.02`. docs/configs.md explains all keys. A config of
your own, in any folder, begins with

    from dilaff_jax.configs import default
"""

import ml_collections

from dilaff_jax import settings


def get_config() -> ml_collections.ConfigDict:
    """The default config: DeepLabv3-R50 with affinity on `shapes`."""
    config = settings.default_config()
    # The head's default sources without "stride2": on CamVid it gained nothing (findings.md),
    # and it moved a third of what the affinity adds to a training step on a TPU (performance.md).
    config.model.affinity = ml_collections.ConfigDict({"sources": ("decoder", "stride4")})
    return config
