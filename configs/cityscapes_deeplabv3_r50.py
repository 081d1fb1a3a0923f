r"""Cityscapes, DeepLabv3 on ResNet-50: mmsegmentation's 80k-iteration recipe.

    python -m dilaff_jax.data.prepare --dataset cityscapes --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/cityscapes_deeplabv3_r50.py \
        --workdir workdirs/city_r50 \
        --config.init.encoder=resnet50-11ad3fa6.pth

For 8 accelerators of 16 GB (1 image each). mmsegmentation's baseline reaches 79.3 mIoU; our figure
is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """SGD 0.01, poly 0.9, crop 512x1024, batch 8; evaluation at 1024x2048."""
    config = default.get_config()
    config.num_steps = 80_000
    config.batch_size = 8
    config.data.update({"dataset": "cityscapes", "crop_size": (512, 1024), "workers": 8})
    config.model.update({"dtype": "bfloat16", "aux": True})
    config.eval_every = 8000
    config.checkpoint_every = 2000
    config.eval.batch_size = 8
    return config
