r"""Hippocampus: does affinity help a three-dimensional U-Net, and more so with few labels?

    python -m dilaff_jax.data.prepare --dataset hippocampus --source Task04_Hippocampus \
        --data_dir data
    python -m dilaff_jax.main --config configs/hippocampus_study.py \
        --workdir workdirs/hippocampus_study --mode study

The network of `hippocampus_unet3d.py` with and without affinity, on all training volumes and on 10,
20 and 40 of them, five seeds. Nothing is selected: each network is evaluated once, at its end, on
the test split, propagated by what `--mode fit` chose on the validation split for a network of
another seed, 100.
"""

from typing import Any

import ml_collections

from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import hippocampus_unet3d

FEW = (10, 20, 40)


def get_config() -> ml_collections.ConfigDict:
    """With and without affinity, on many and on few volumes."""
    config = hippocampus_unet3d.get_config()
    config.checkpoint_every = 1200
    config.eval.pictures = 0
    with config.ignore_type():
        config.refine = {
            "name": "random_walk",
            "bias": (-1.8510934, -1.4961423),  # half of the fitted one
            "restart": 0.0,
            "sharpness": 8.0,
            "steps": 3,
        }
    config.ablate = ablate_config.default()
    config.ablate.report_split = "test"
    config.ablate.seeds = (0, 1, 2, 3, 4)
    changes: dict[str, dict[str, Any]] = {}
    for count in FEW:
        few = {"data": {"train_images": count}}
        changes[f"baseline_{count}"] = few | {"loss": {"affinity": 0.0}}
        changes[f"joint_{count}"] = few
    with config.ignore_type():
        config.ablate.changes = changes
        config.ablate.grid = {}
    return config
