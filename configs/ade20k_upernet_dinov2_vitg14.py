r"""ADE20K (150 classes), UPerNet on DINOv2 ViT-g/14, fine-tuned whole: a model for a slice.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/ade20k_upernet_dinov2_vitg14.py \
        --workdir workdirs/ade_vitg \
        --config.init.encoder=hf://facebook/dinov2-giant

1.1 billion parameters, with their gradients and two moments 18 GB: more than a TPU v5e has, so that
they lie in pieces on all devices (parallel.mode = "fsdp"). Our figure is yet to be measured.
"""

import ml_collections

from dilaff_jax.configs import ade20k_dinov2_vits14_linear


def get_config() -> ml_collections.ConfigDict:
    """AdamW 3e-5 falling by 0.9 a layer towards the image, crop 518² (37 x 37 patches)."""
    config = ade20k_dinov2_vits14_linear.get_config()
    config.num_steps = 80_000
    config.data.crop_size = (518, 518)
    config.model.update({"encoder": "dinov2_vitg14", "decoder": "upernet", "remat": True})
    config.model.encoder_options = {"blocks": (9, 19, 29, 39), "drop_path": 0.3}
    config.model.decoder_options = {"scales": (4, 2, 1, 0.5)}
    config.optim.frozen = ()
    config.optim.update({"learning_rate": 3e-5, "weight_decay": 0.05, "layer_decay": 0.9})
    config.parallel.mode = "fsdp"
    return config
