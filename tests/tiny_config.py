"""A run of seconds on `shapes/tiny`, in process or as `--config tests/tiny_config.py`."""

from dilaff_jax.configs import default
from tests import tiny


def get_config():
    config = tiny.model_config(default.get_config())
    config.num_steps = 6
    config.batch_size = 4
    config.data.update({"dataset": "shapes/tiny", "crop_size": (32, 32)})
    config.optim.update({"learning_rate": 0.05, "ema": 0.5})
    config.log_every = 2
    config.eval_every = 4
    config.checkpoint_every = 2
    config.eval.update({"batch_size": 4, "pictures": 1})
    return config
