r"""As voc2012_deeplabv3_r50, on ResNet-101 and for 40k iterations.

    python -m dilaff_jax.main --config configs/voc2012_deeplabv3_r101.py \
        --workdir workdirs/voc_r101 \
        --config.init.encoder=resnet101-cd907fc2.pth

mmsegmentation's baseline reaches 78.7 mIoU; our figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import voc2012_deeplabv3_r50


def get_config() -> ml_collections.ConfigDict:
    """A deeper encoder, twice the steps."""
    config = voc2012_deeplabv3_r50.get_config()
    config.num_steps = 40_000
    config.model.encoder = "resnet101"
    return config
