"""`config.data`: defaults, and errors that say what is allowed."""

import pytest

from dilaff_jax.data import config


def test_the_default_is_valid():
    config.check(config.default())


def test_every_key_is_documented():
    for key in config.default():
        assert f"\n        {key}: " in config.default.__doc__, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (64, 64)}, "no key 'crop'; did you mean 'crop_size'"),
        ({"banana": 1}, "no key 'banana'; allowed: base_size, cache, cat_max_ratio"),
        ({"crop_size": 64}, r"crop_size=64: want \(height, width\)"),
        ({"crop_size": (64, 0)}, r"crop_size=\(64, 0\): want"),
        ({"crop_size": (64, 64, 3)}, "want"),
        ({"scale_range": (2.0, 0.5)}, r"scale_range=\(2.0, 0.5\): want \(lowest, highest\)"),
        ({"scale_range": (0, 1)}, "want"),
        ({"scale_range": (float("nan"), 1)}, "want"),
        ({"cat_max_ratio": 0}, "cat_max_ratio=0(.0)?: want a share"),
        ({"flip": True}, None),
        ({"flip": 1.5}, "flip=1.5: want a probability"),
        ({"photometric": "yes"}, "photometric='yes': want True or False"),
        ({"pad_rgb": (0.5, 0.5, 0.5)}, "whole numbers 0 to 255"),
        ({"pad_rgb": (0, 0, 256)}, "whole numbers 0 to 255"),
        ({"resize": 0}, "resize=0(.0)?: want a factor"),
        ({"workers": -1}, "workers=-1: want a number of processes"),
        ({"workers": 1.5}, "want a number of processes"),
        ({"prefetch": 0}, "prefetch=0: want a number of batches, 1 or more"),
        ({"hold_out": "0006R0"}, r"hold_out='0006R0': want a tuple"),
        ({"hold_out": ("",)}, "want a tuple"),
        ({"eval_size": 512}, "eval_size=512: want"),
        ({"dataset": ""}, "dataset='': want the name of a data set"),
        ({"train_split": None}, "train_split=None: want"),
        ({"base_size": 0}, "base_size=0: want a number of pixels, or None"),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(change, message):
    if message is None:
        config.default(**change)
        return
    with pytest.raises(ValueError, match=message):
        config.default(**change)


def test_a_missing_key_is_named():
    data = config.default()
    del data.workers
    with pytest.raises(ValueError, match="lacks 'workers'"):
        config.check(data)
