r"""ADE20K (150 classes), a linear layer on frozen DINOv2 ViT-S/14: its authors' protocol.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/ade20k_dinov2_vits14_linear.py \
        --workdir workdirs/ade_dinov2 \
        --config.init.encoder=hf://facebook/dinov2-small

What is trained is BatchNorm, a linear classifier, and the affinity head, which reads the image by a
stem of its own: tokens of 14 pixels keep no borders. The authors' linear layer reaches 44.3 mIoU
(https://arxiv.org/abs/2304.07193); our figure is yet to be measured. B, L and g:
--config.model.encoder=dinov2_vitb14 and so on. Their "+ms":
--config.model.decoder_options="{'levels': 4}".
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """AdamW 1e-3, 40k steps of 16 images, crop 512²; the encoder is frozen."""
    config = default.get_config()
    config.num_steps = 40_000
    config.batch_size = 16
    config.data.update({"dataset": "scene_parse150", "crop_size": (512, 512), "workers": 8})
    with config.data.ignore_type():
        config.data.base_size = 512
    config.model.update({"encoder": "dinov2_vits14", "output_stride": 16, "dtype": "bfloat16"})
    config.model.update({"decoder": "linear"})
    config.model.affinity.sources = ("image", "decoder", "probabilities")
    config.optim.frozen = ("encoder",)
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4})
    config.optim.update({"power": 1.0, "warmup_steps": 1500})
    with config.inference.ignore_type():
        config.inference.window = (512, 512)
    config.eval_every = 4000
    config.checkpoint_every = 2000
    config.eval.batch_size = 8
    return config
