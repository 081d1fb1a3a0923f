r"""What decides the gain, on `shapes`: one small network a change of head, loss and propagation.

    python -m dilaff_jax.data.prepare --dataset shapes --data_dir data
    python -m dilaff_jax.main --config configs/shapes_study.py \
        --workdir workdirs/shapes_study --mode study

Eleven networks of about four minutes each on one CPU core; started several times at once, the
processes share them. docs/findings.md says what was found (results/study_shapes.json).
"""

from typing import Any

import ml_collections

from dilaff_jax.configs import shapes_quickstart


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's network, and what is changed of it."""
    config = shapes_quickstart.get_config()
    config.checkpoint_every = 280
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
