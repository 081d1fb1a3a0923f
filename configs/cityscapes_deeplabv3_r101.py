r"""As cityscapes_deeplabv3_r50, on ResNet-101.

    python -m dilaff_jax.main --config configs/cityscapes_deeplabv3_r101.py \
        --workdir workdirs/city_r101 \
        --config.init.encoder=resnet101-cd907fc2.pth

mmsegmentation's baseline reaches 80.2 mIoU; our figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import cityscapes_deeplabv3_r50


def get_config() -> ml_collections.ConfigDict:
    """A deeper encoder."""
    config = cityscapes_deeplabv3_r50.get_config()
    config.model.encoder = "resnet101"
    return config
