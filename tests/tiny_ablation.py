"""The ablation of `tiny_config`: of seconds, without rivals."""

from dilaff_jax.ablation import ablate_config
from tests import tiny_config


def get_config():
    config = tiny_config.get_config()
    config.num_steps = 4
    config.parallel.devices = 1
    config.ablate = ablate_config.default()
    config.ablate.update({"seeds": (3,), "processes": 1, "resamples": 50, "repeats": 1})
    config.ablate.update({"pictures": 1, "rivals": {}})
    with config.ignore_type():
        config.ablate.rivals = {}
        config.ablate.grid = {"random_walk": {"steps": (1,), "sharpness": (4.0,)}}
    return config
