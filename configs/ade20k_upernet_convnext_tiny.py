r"""ADE20K (150 classes), UPerNet on ConvNeXt-T: mmsegmentation's 160k-iteration recipe.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/ade20k_upernet_convnext_tiny.py \
        --workdir workdirs/ade_convnext \
        --config.init.encoder=hf://facebook/convnext-tiny-224

For 8 accelerators of 16 GB (2 images each), ImageNet-1k weights; the paper's settings
(https://arxiv.org/abs/2201.03545). With them mmsegmentation's baseline reaches 46.1 mIoU; our
figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """AdamW 1e-4 falling by 0.9 a layer towards the image, poly 1.0, crop 512²."""
    config = default.get_config()
    config.num_steps = 160_000
    config.batch_size = 16
    config.data.update({"dataset": "scene_parse150", "crop_size": (512, 512), "workers": 8})
    with config.data.ignore_type():
        config.data.base_size = 512
    config.model.update({"encoder": "convnext_tiny", "output_stride": 32, "dtype": "bfloat16"})
    config.model.update({"decoder": "upernet", "aux": True, "aux_options": {"width": 256}})
    config.model.encoder_options = {"drop_path": 0.4}
    config.model.affinity.sources = ("image", "stride4", "decoder")
    config.optim.update({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.05})
    config.optim.update({"power": 1.0, "warmup_steps": 1500, "layer_decay": 0.9})
    with config.inference.ignore_type():
        config.inference.window = (512, 512)
    config.eval_every = 16_000
    config.checkpoint_every = 4000
    config.eval.batch_size = 8
    return config
