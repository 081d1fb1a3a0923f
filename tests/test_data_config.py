"""`config.data`: defaults, and errors that say what is allowed."""

import pytest

from dilaff_jax.data import data_config


def test_the_default_is_valid():
    data_config.check(data_config.default())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (64, 64)}, "no key 'crop' \\(did you mean 'crop_size'"),
        ({"banana": 1}, "no key 'banana'; allowed: dataset, data_dir, train_split"),
        ({"crop_size": 64}, r"crop_size is 64; expected \(height, width\)"),
        ({"crop_size": (64, 0)}, r"crop_size is \(64, 0\); expected"),
        ({"crop_size": (64, 64, 64, 3)}, "expected"),
        ({"scale_range": (2.0, 0.5)}, r"scale_range is \(2.0, 0.5\); expected \(lowest, highest\)"),
        ({"scale_range": (0, 1)}, "expected"),
        ({"scale_range": (float("nan"), 1)}, "expected"),
        ({"cat_max_ratio": 0}, "cat_max_ratio is 0(.0)?; expected a share"),
        ({"flip": True}, None),
        ({"flip": 1.5}, "flip is 1.5; expected a probability"),
        ({"photometric": "yes"}, "photometric is 'yes'; expected True or False"),
        ({"pad_rgb": (0.5, 0.5, 0.5)}, "whole numbers 0 to 255"),
        ({"pad_rgb": (0, 0, 256)}, "whole numbers 0 to 255"),
        ({"resize": 0}, "resize is 0(.0)?; expected a factor"),
        ({"workers": -1}, "workers is -1; expected a number of processes"),
        ({"workers": 1.5}, "expected a number of processes"),
        ({"prefetch": 0}, "prefetch is 0; expected a number of batches, 1 or more"),
        ({"hold_out": "0006R0"}, r"hold_out is '0006R0'; expected a tuple"),
        ({"hold_out": ("",)}, "expected a tuple"),
        ({"eval_size": 512}, "eval_size is 512; expected"),
        ({"dataset": ""}, "dataset is ''; expected the name of a data set"),
        ({"train_split": None}, "train_split is None; expected"),
        ({"base_size": 0}, "base_size is 0; expected a number of pixels, or None"),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(change, message):
    if message is None:
        data_config.default(**change)
        return
    with pytest.raises(ValueError, match=message):
        data_config.default(**change)


def test_a_missing_key_is_named():
    data = data_config.default()
    del data.workers
    with pytest.raises(ValueError, match="lacks 'workers'"):
        data_config.check(data)
