r"""CamVid at full resolution on one accelerator: DeepLabv3 on ResNet-50, bfloat16.

    python -m dilaff_jax.data.prepare --dataset camvid --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/camvid_deeplabv3_r50.py \
        --workdir workdirs/camvid_r50 \
        --config.init.encoder=resnet50-11ad3fa6.pth

One GPU or TPU chip of 16 GB or more. The weights are torchvision's ImageNet file; without them the
encoder starts from chance and ends far lower.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """The default with CamVid's sizes."""
    config = default.get_config()
    config.num_steps = 6000
    config.batch_size = 16
    config.data.update({"dataset": "camvid", "crop_size": (360, 480), "workers": 4})
    config.model.update({"dtype": "bfloat16", "aux": True})
    config.optim.update({"learning_rate": 0.01, "warmup_steps": 200, "head_multiplier": 10.0})
    return config
