r"""A three-dimensional U-Net with dilated affinity on hippocampus.

    python -m dilaff_jax.data.prepare --dataset hippocampus --source Task04_Hippocampus \
        --data_dir data
    python -m dilaff_jax.main --config configs/hippocampus_unet3d.py --workdir workdirs/hippocampus

Patches of 32 x 40 x 32 voxels, half of them around a voxel of a class that is not background. The
affinity head reads full resolution; 26 neighbours at each of two dilations.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """U-Net of four scales, cross-entropy and Dice, AdamW."""
    config = default.get_config()
    config.num_steps = 1200
    config.batch_size = 4
    config.eval_every = 400
    config.checkpoint_every = 200
    config.best_metric = "dice"
    config.data.update({"dataset": "hippocampus", "crop_size": (32, 40, 32)})
    config.data.update({"rare": 0.5, "scale_range": (0.8, 1.25), "rotation": 15.0})
    # Anterior and posterior are told apart by where they lie: flipped ones teach the contrary.
    config.data.flip = 0.0
    config.data.bands = 1
    config.model.update({"ndim": 3, "encoder": "unet", "decoder": "unet", "output_stride": 8})
    config.model.encoder_options = {"widths": (16, 32, 64, 96), "mean": (0.0,), "std": (1.0,)}
    config.model.decoder_options = {"widths": (64, 32, 16), "dropout": 0.0}
    config.model.norm = "instance"
    config.model.affinity = {
        "dilations": (1, 2),
        "stride": 1,
        "sources": ("decoder", "stride1"),
        "width": 16,
        "rates": (1,),
    }
    config.loss.segmentation = "cross_entropy + dice"
    # Weights by frequency, 1 to 7, outline the classes too large.
    config.loss.segmentation_options = {"cross_entropy": {"class_weights": (0.5, 1.5, 1.5)}}
    config.optim.update({"name": "adamw", "learning_rate": 5e-3, "weight_decay": 1e-4})
    config.optim.update({"warmup_steps": 50, "clip_norm": 1.0})
    config.eval.update({"batch_size": 4, "pictures": 4})
    return config
