r"""VOC 2012 + SBD ("trainaug"), a linear layer on frozen DINOv2 ViT-S/14: its authors' protocol.

    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/voc2012_dinov2_vits14_linear.py \
        --workdir workdirs/voc_dinov2 \
        --config.init.encoder=hf://facebook/dinov2-small

The authors' linear layer reaches 81.1 mIoU (https://arxiv.org/abs/2304.07193); our figure is yet to
be measured. DINOv3: --config.model.encoder=dinov3_vits16 and its weights.
"""

import ml_collections

from dilaff_jax.configs import ade20k_dinov2_vits14_linear


def get_config() -> ml_collections.ConfigDict:
    """As on ADE20K."""
    config = ade20k_dinov2_vits14_linear.get_config()
    config.data.update({"dataset": "voc2012_seg", "train_split": "train+aug"})
    with config.data.ignore_type():
        config.data.base_size = None
    return config
