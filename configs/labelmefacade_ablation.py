r"""LabelMeFacade at half resolution: the ablation of `camvid_ablation.py` on another data set.

    pip install -e '.[torch,pretrained,crf,report]'
    python -m dilaff_jax.data.prepare --dataset image_folder --name labelmefacade --source DIR \
        --data_dir data --classes building,car,door,pavement,road,sky,vegetation,window
    python -m dilaff_jax.main --config configs/labelmefacade_ablation.py \
        --workdir workdirs/facade_ablation --mode ablate

LabelMeFacade: Fröhlich, Rodner and Denzler, ICPR 2010. Selected on the training images whose names
begin with `spatial_`, a collection of its own, which are left out of training. An hour of two CPU
cores.
"""

import ml_collections

from dilaff_jax.configs import camvid_ablation


def get_config() -> ml_collections.ConfigDict:
    """Other images and fewer steps; no class weights, which are CamVid's."""
    config = camvid_ablation.get_config()
    config.data.update({"dataset": "image_folder/labelmefacade", "hold_out": ("spatial_",)})
    config.data.crop_size = (160, 160)
    config.num_steps = 300
    config.loss.segmentation_options = {}
    config.loss.affinity_class_weights = ()
    config.ablate.changes = {}
    config.ablate.rival_images = 40
    return config
