r"""A plain U-Net on `shapes`, in minutes on two CPU cores: what `launch/quickstart.sh` trains.

    python -m dilaff_jax.data.prepare --dataset shapes --data_dir data
    python -m dilaff_jax.main --config configs/shapes_quickstart.py --workdir workdirs/joint
    python -m dilaff_jax.main --config configs/shapes_quickstart.py \
        --workdir workdirs/baseline \
        --config.loss.affinity=0

The plain baseline is the second command: no affinity loss, hence no affinity head. `--mode ablate`
compares the two over seeds. Classes are told at stride 8, as in DeepLab, and affinities at stride
2, from features of full resolution. results/quickstart.json has what three seeds reach.
"""

import ml_collections

from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """The default, made small enough for a laptop."""
    config = default.get_config()
    config.num_steps = 1000
    config.batch_size = 8
    config.data.update({"dataset": "shapes", "crop_size": (96, 96), "scale_range": (1.0, 1.0)})
    config.data.cache = True
    config.model.update({"encoder": "unet", "output_stride": 16, "decoder": "unet"})
    config.model.encoder_options = {"widths": (12, 32, 64, 96, 128)}
    config.model.decoder_options = {"widths": (96,)}
    config.model.affinity.update({"stride": 2, "width": 24})
    config.model.affinity.sources = ("decoder", "stride2", "stride1")
    config.loss.segmentation_options.class_weights = "median_frequency"
    config.optim.update({"name": "adamw", "learning_rate": 6e-3, "weight_decay": 1e-2})
    config.optim.update({"schedule": "cosine", "warmup_steps": 20, "clip_norm": 1.0})
    config.log_every = 20
    config.eval_every = 1000
    config.checkpoint_every = 250
    config.eval.batch_size = 24
    config.ablate = ablate_config.default()
    return config
