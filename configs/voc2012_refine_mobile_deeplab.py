r"""VOC 2012: an affinity head beside a frozen DeepLabv3-MobileNetV2 that somebody else trained.

    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data
    python -m dilaff_jax.main --config configs/voc2012_refine_mobile_deeplab.py \
        --workdir workdirs/voc_refine --config.init.model=deeplabv3_mobilenet_v2_pascal.npz

The base is TensorFlow's mobile DeepLab (`deeplabv3_mnv2_pascal`): its padding, its input of 513²,
its enlargement with corners on corners, BatchNorm folded. Encoder and decoder keep their weights,
so that the plain segmentation stays what it was to the bit; what is trained is the head alone,
which reads the image by a stem of its own, the encoder's and the decoder's maps, and the
segmentation's probabilities.

`--mode ablate` reports on the validation split and selects on training images that were not trained
on: those whose names begin with 2007_000, 2007_001 or 2007_002.
"""

import ml_collections

from dilaff_jax.configs import default

# Training images to choose a refinement by, with every class among them (a year has not).
HELD_OUT = ("2007_000", "2007_001", "2007_002")


def get_config() -> ml_collections.ConfigDict:
    """Whole images of 513², batch 6: small enough for a CPU."""
    config = default.get_config()
    config.num_steps = 700
    config.batch_size = 6
    config.data.update({"dataset": "voc2012_seg", "crop_size": (513, 513), "eval_size": (513, 513)})
    config.data.update({"scale_range": (0.75, 1.5), "pad_rgb": (128, 128, 128)})
    config.data.hold_out = HELD_OUT
    config.model.update({"encoder": "mobilenet_v2_tf", "output_stride": 16})
    config.model.encoder_options = {"mean": (128.0,) * 3, "std": (128.0,) * 3}
    config.model.decoder_options = {"rates": (), "head": False}
    config.model.segmentation.align_corners = True
    config.model.affinity.update({"sources": ("image", "stride4", "decoder", "probabilities")})
    config.init.update({"folded": True, "keep": ("affinity_head.*",)})
    config.optim.frozen = ("encoder", "decoder")
    config.optim.update({"name": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-2})
    config.optim.update({"schedule": "cosine", "warmup_steps": 30, "clip_norm": 1.0})
    # As chosen and fitted by voc2012_refine_ablation.py, the mean of three seeds; `--mode fit` does
    # it for a run of your own.
    config.refine.update({"steps": 10, "strength": 0.3, "bias": (-4.97, -3.04, -2.12, -1.46)})
    config.log_every = 20
    config.eval_every = 10_000
    config.checkpoint_every = 100
    config.eval.batch_size = 4
    return config
