r"""ADE20K (150 classes), SegFormer-B2: the paper's 160k-iteration recipe.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/ade20k_segformer_b2.py \
        --workdir workdirs/ade_segformer_b2 \
        --config.init.encoder=hf://nvidia/mit-b2

For 8 accelerators of 16 GB (2 images each), ImageNet weights of NVIDIA's. The baseline of the paper
reaches 46.5 mIoU (https://arxiv.org/abs/2105.15203); our figure is yet to be measured.
B0, B1, B3, B4, B5: --config.model.encoder=mit_b0 and so on (B0 and B1 have a decoder of width 256).
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """AdamW 6e-5, ten times that in the decoder, poly 1.0, crop 512²."""
    config = default.get_config()
    config.num_steps = 160_000
    config.batch_size = 16
    config.data.update({"dataset": "scene_parse150", "crop_size": (512, 512), "workers": 8})
    with config.data.ignore_type():
        config.data.base_size = 512
    config.model.update({"encoder": "mit_b2", "output_stride": 32, "dtype": "bfloat16"})
    config.model.update({"decoder": "segformer", "decoder_options": {"width": 768}})
    config.model.encoder_options = {"drop_path": 0.1}
    config.model.affinity.sources = ("image", "stride4", "decoder")
    config.optim.update({"name": "adamw", "learning_rate": 6e-5, "weight_decay": 0.01})
    config.optim.update({"power": 1.0, "warmup_steps": 1500, "head_multiplier": 10.0})
    config.eval_every = 16_000
    config.checkpoint_every = 4000
    config.eval.batch_size = 8
    return config
