r"""An affinity network by itself on Cityscapes, for accelerators.

    python -m dilaff_jax.data.prepare --dataset cityscapes --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/cityscapes_affinity_r50.py \
        --workdir workdirs/affinity --config.init.encoder=resnet50-11ad3fa6.pth

ResNet-50 with DeepLabv3+'s decoder and a head of width 128 on a grid of stride 2. For 8 devices of
16 GB, one image each. Not measured yet: no figure of it is in results/.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Affinities alone, crops of 512 x 1024."""
    config = default.get_config()
    config.num_steps = 40_000
    config.batch_size = 8
    config.data.update({"dataset": "cityscapes", "crop_size": (512, 1024), "workers": 8})
    with config.model.ignore_type():
        config.model.segmentation = None
    config.model.update({"dtype": "bfloat16", "output_stride": 16, "decoder": "deeplabv3plus"})
    config.model.affinity.update({"sources": ("image", "stride2", "stride4", "decoder")})
    config.model.affinity.update({"stride": 2, "width": 128})
    config.model.affinity.dilations = (1, 2, 4, 8, 16)
    config.best_metric = "affinity/mean/average_precision"
    config.eval_every = 4000
    config.checkpoint_every = 1000
    return config
