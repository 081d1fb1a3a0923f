r"""SegFormer with a very small MiT, from random weights, on `shapes`: the whole path on a CPU.

    python -m dilaff_jax.data.prepare --dataset shapes --data_dir data
    python -m dilaff_jax.main --config configs/shapes_segformer.py --workdir workdirs/segformer

About a quarter of an hour on two cores. Transformers learn little from so little; what this shows
is that training, evaluation, prediction and export of one work.
results/shapes_segformer.json has what it reached.
"""

import ml_collections

from dilaff_jax.configs import shapes_quickstart


def get_config() -> ml_collections.ConfigDict:
    """Half of MiT-B0's widths, blocks and decoder; AdamW."""
    config = shapes_quickstart.get_config()
    config.num_steps = 1200
    config.batch_size = 16
    config.model.update({"encoder": "mit_b0", "output_stride": 32, "decoder": "segformer"})
    config.model.encoder_options = {"widths": (24, 48, 96, 128), "depths": (1, 1, 2, 1)}
    config.model.encoder_options.update({"heads": (1, 2, 3, 4), "reductions": (4, 2, 1, 1)})
    config.model.decoder_options = {"width": 96}
    config.model.affinity.sources = ("image", "stride4", "decoder")
    config.optim.update({"learning_rate": 2e-3, "warmup_steps": 100})
    return config
