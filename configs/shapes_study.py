r"""What decides the gain, on `shapes`: one small network a change of head, loss and propagation.

    python -m dilaff_jax.data.prepare --dataset shapes/hard --data_dir data \
        --train 480 --object_scale 100 --tint 0
    python -m dilaff_jax.main --config configs/shapes_study.py \
        --workdir workdirs/shapes_study --mode study

ResNet-18 of 12 million parameters under a U-Net decoder, 280 steps: eleven networks of about four
minutes each on one CPU core; started several times at once, the processes share them.
docs/findings.md says what was found (results/study_shapes.json).
"""

from typing import Any

import ml_collections

from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """A small network, and what is changed of it."""
    config = default.get_config()
    config.num_steps = 280
    config.batch_size = 8
    config.data.update({"dataset": "shapes/hard", "crop_size": (96, 96)})
    config.data.update({"scale_range": (1.0, 1.0), "cache": True})
    config.model.update({"encoder": "resnet18", "output_stride": 32, "decoder": "unet"})
    config.model.decoder_options = {"widths": (64, 48, 32)}
    config.model.affinity.update({"width": 32, "sources": ("decoder", "stride2")})
    config.optim.update({"name": "adamw", "learning_rate": 4e-3, "weight_decay": 1e-2})
    config.optim.update({"schedule": "cosine", "warmup_steps": 20, "clip_norm": 1.0})
    config.log_every = 20
    config.eval_every = 280
    config.checkpoint_every = 280
    config.ablate = ablate_config.default()
    config.ablate.criterion = "miou+boundary_f"
    config.ablate.update({"selection_split": "validation", "seeds": (0,)})
    head: dict[str, dict[str, Any]] = {
        "reads_decoder": {"sources": ("decoder",)},
        "reads_stride2": {"sources": ("stride2",)},
        "stride_2": {"stride": 2},
        "stride_1": {"stride": 1},
        "dilations_1": {"dilations": (1,)},
        "symmetric": {"symmetric": True},
    }
    loss: dict[str, dict[str, Any]] = {
        "bce": {"affinity_loss": "bce"},
        "lambda_quarter": {"affinity": 0.25},
        "lambda_4": {"affinity": 4.0},
    }
    changes = {name: {"model": {"affinity": change}} for name, change in head.items()}
    changes |= {name: {"loss": change} for name, change in loss.items()}
    with config.ignore_type():
        config.ablate.changes = changes
        config.ablate.grid = {
            "signed": {
                "steps": (5,),
                "strength": (0.05, 0.1, 0.2),
                "bias": ("fitted", "fitted*0.5", "fitted*0.25", 0.0),
            },
            "random_walk": {"steps": (3,), "sharpness": (1.0, 4.0, 8.0), "bias": ("fitted",)},
        }
    return config
