r"""Cityscapes, SegFormer-B2: the paper's 160k-iteration recipe on crops of 1024².

    python -m dilaff_jax.data.prepare --dataset cityscapes --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/cityscapes_segformer_b2.py \
        --workdir workdirs/city_segformer_b2 \
        --config.init.encoder=hf://nvidia/mit-b2

For 8 accelerators of 16 GB (1 image each). The baseline of the paper reaches 81.0 mIoU
(https://arxiv.org/abs/2105.15203, windows of 1024²); our figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import ade20k_segformer_b2


def get_config() -> ml_collections.ConfigDict:
    """As on ADE20K, with crops of 1024² and 8 images a step."""
    config = ade20k_segformer_b2.get_config()
    config.batch_size = 8
    config.data.update({"dataset": "cityscapes", "crop_size": (1024, 1024)})
    with config.data.ignore_type():
        config.data.base_size = None
    with config.inference.ignore_type():
        config.inference.window = (1024, 1024)
    config.eval.batch_size = 4
    return config
