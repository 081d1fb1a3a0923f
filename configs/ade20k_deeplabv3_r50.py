r"""ADE20K (150 classes), DeepLabv3 on ResNet-50: mmsegmentation's 160k-iteration recipe.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/ade20k_deeplabv3_r50.py \
        --workdir workdirs/ade_r50 \
        --config.init.encoder=resnet50-11ad3fa6.pth

For 8 accelerators of 16 GB (2 images each). Images are brought to a shorter side of 512 times the
random scale in training; evaluation slides a window of 512² over each image as it is. Our figure is
yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """SGD 0.01, poly 0.9, crop 512², 160k steps."""
    config = default.get_config()
    config.num_steps = 160_000
    config.batch_size = 16
    config.data.update({"dataset": "scene_parse150", "crop_size": (512, 512), "workers": 8})
    with config.data.ignore_type():
        config.data.base_size = 512
    config.model.update({"dtype": "bfloat16", "aux": True})
    with config.inference.ignore_type():
        config.inference.window = (512, 512)
    config.eval_every = 16_000
    config.checkpoint_every = 4000
    config.eval.batch_size = 8
    return config
