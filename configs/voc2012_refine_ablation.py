r"""VOC 2012: a frozen mobile DeepLab by itself, refined by three affinity heads, and by DenseCRF.

    pip install -e '.[crf,report]'
    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/voc2012_refine_ablation.py --mode ablate \
        --workdir workdirs/voc_refine_ablation \
        --config.init.model=deeplabv3_mobilenet_v2_pascal.npz

The arm "joint" is the frozen base, whose plain output is the same to the bit in all seeds;
"refined" is what the heads of three seeds make of it. All is selected on the training images whose
names begin with 2007_000, 2007_001 or 2007_002, on which no head was trained (what the base was
trained on, its authors know); all twenty classes are among them, which a year by itself does not
grant.
"""

import ml_collections

from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import voc2012_refine_mobile_deeplab


def get_config() -> ml_collections.ConfigDict:
    """Three seeds of 400 steps; results/ablation_voc2012_refine.json has what they took."""
    config = voc2012_refine_mobile_deeplab.get_config()
    config.num_steps = 400
    config.eval.pictures = 0
    config.ablate = ablate_config.default()
    config.ablate.update({"arms": ("joint", "refined"), "rival_images": 40})
    config.ablate.update({"selection_split": "held_out", "report_split": "validation"})
    with config.ignore_type():
        bias = ("fitted", "fitted*0.75", "fitted*0.5")
        config.ablate.grid = {
            "signed": {"steps": (5, 10), "strength": (0.1, 0.3), "bias": bias},
            "signed_weak_repulsion": {
                "name": "signed",
                "steps": (10,),
                "strength": (0.3,),
                "bias": ("fitted",),
                "repulsion": (0.25, 0.5),
            },
        }
        config.ablate.rivals = {
            "dense_crf": {
                "steps": (5,),
                "spatial_sigma": (3.0,),
                "bilateral_sigma": (20.0, 60.0),
                "color_sigma": (5.0, 13.0),
                "bilateral_weight": (4.0, 10.0),
            }
        }
    return config
