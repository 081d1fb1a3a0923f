r"""VOC 2012 + SBD ("trainaug"), DeepLabv3 on ResNet-50: mmsegmentation's 20k-iteration recipe.

    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/voc2012_deeplabv3_r50.py \
        --workdir workdirs/voc_r50 \
        --config.init.encoder=resnet50-11ad3fa6.pth

For 8 accelerators of 16 GB (2 images each), ImageNet weights from torchvision. With this recipe the
baseline of mmsegmentation reaches 76.2 mIoU; our figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """SGD 0.01, poly 0.9, crop 512², output stride 8, auxiliary head 0.4."""
    config = default.get_config()
    config.num_steps = 20_000
    config.batch_size = 16
    config.data.update({"dataset": "voc2012_seg", "train_split": "train+aug", "workers": 8})
    config.data.crop_size = (512, 512)
    config.model.update({"dtype": "bfloat16", "aux": True})
    config.eval_every = 2000
    config.checkpoint_every = 1000
    return config
