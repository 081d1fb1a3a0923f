"""The keys of `config.data`: default, rule and meaning of each."""

from typing import Any

import ml_collections

from dilaff_jax import schema
from dilaff_jax.schema import Key, Rule

KEYS: schema.Section = {
    "dataset": Key(
        "shapes",
        Rule("the name of a data set, such as 'shapes' or 'image_folder/pets'", schema.is_name),
        "Module in `dilaff_jax.data`, with the name it was prepared under if it has one: "
        "`image_folder/pets`.",
    ),
    "data_dir": Key(
        "data",
        Rule("the folder that `prepare` wrote to", schema.is_name),
        "Folder that `prepare` wrote to.",
    ),
    "train_split": Key(
        "train",
        Rule("the name of a split, or several joined by +", schema.is_name),
        "A split, or several: `train+aug`.",
    ),
    "eval_split": Key(
        "validation",
        Rule("the name of a split, or 'held_out'", schema.is_name),
        "A split, or `held_out`.",
    ),
    "hold_out": Key(
        (),
        Rule(
            "a tuple of name prefixes, such as ('0006R0',)",
            lambda v: schema.is_sequence(v) and all(map(schema.is_name, v)),
        ),
        "Prefixes of names (CamVid: sequences) that are left out of `train_split`; exactly they "
        "are evaluated with `eval_split='held_out'`.",
    ),
    "train_images": Key(
        0,
        schema.WHOLE,
        "So many examples of `train_split`, after `hold_out`, by a hash of their names, so that "
        "the smaller choice is a part of the larger one; 0: all. What fewer labels would give.",
    ),
    "resize": Key(
        1.0,
        Rule("a factor above 0, up to 8", lambda v: 0 < v <= 8),
        "Factor on every image (by area) and label (nearest) when it is read, in training and "
        "evaluation: 0.5 trains at half resolution, and evaluation then counts pixels there.",
    ),
    "crop_size": Key(
        (128, 128),
        Rule(
            "(height, width) in pixels, such as (512, 512); of volumes three sides", schema.is_size
        ),
        "(height, width) of training crops; of volumes the three sides of patches.",
    ),
    "scale_range": Key(
        (0.5, 2.0),
        Rule(
            "(lowest, highest), such as (0.5, 2.0)",
            lambda v: schema.is_sequence(v, 2) and 0.01 <= v[0] <= v[1] <= 100,
        ),
        "Random scale, uniform between the two.",
    ),
    "base_size": Key(
        schema.Unset(int),
        Rule("a number of pixels, or None", lambda v: v is None or schema.is_whole(v, 1)),
        "If given, the shorter side is brought to this times the random scale.",
    ),
    "cat_max_ratio": Key(
        0.75,
        Rule("a share above 0, up to 1", lambda v: 0 < v <= 1),
        "A crop in which one class has more than this share of the labelled pixels is drawn "
        "again, up to 10 times (mmsegmentation's option); 1.0: never.",
    ),
    "flip": Key(
        0.5,
        Rule("a probability, 0 to 1", lambda v: 0 <= v <= 1),
        "Probability of a horizontal flip; of volumes of a flip along each axis.",
    ),
    "photometric": Key(
        True,
        schema.SWITCH,
        "Random brightness, contrast, saturation and hue (SSD's, as in mmsegmentation); of bands "
        "brightness and contrast; of volumes these, noise and gamma.",
    ),
    "rotation": Key(
        0.0,
        Rule("degrees, 0 to 180", lambda v: 0 <= v <= 180),
        "Of volumes: patches are turned about each axis by up to so many degrees.",
    ),
    "rare": Key(
        0.0,
        schema.UP_TO_1,
        "Of volumes: share of the patches that are drawn around a voxel of a class that is not its "
        "volume's most frequent one, all such classes alike.",
    ),
    "normalise": Key(
        "zscore",
        schema.choice("zscore", "percentiles", "none"),
        "Of volumes, each by itself: `zscore`, mean 0 and deviation 1; `percentiles`, the 0.5th is "
        "0 and the 99.5th is 1; `none`: by means and deviations of the training split.",
    ),
    "pad_rgb": Key(
        (124, 116, 104),  # the mean of ImageNet
        Rule(
            "(red, green, blue), whole numbers 0 to 255",
            lambda v: (
                schema.is_sequence(v, 3) and all(schema.is_whole(c, 0) and c < 256 for c in v)
            ),
        ),
        "Colour outside the image; of bands it is their means. Labels get 255 there.",
    ),
    "bands": Key(
        0,
        schema.at_least(0, "a number of bands, 0 for what the data set says"),
        "Number of the images' bands; 0 for RGB of 8 bits. Data sets of bands fill it in, with "
        "their means and deviations in `model.encoder_options`.",
    ),
    "shown_bands": Key(
        (),
        Rule(
            "() or the numbers of one or three bands, from 1, such as (4, 3, 2)",
            lambda v: (
                schema.is_sequence(v)
                and len(v) in (0, 1, 3)
                and all(schema.is_whole(n, 1) for n in v)
            ),
        ),
        "Which bands pictures show as red, green and blue; () for the first three, or the first. "
        "Decides nothing else.",
    ),
    "eval_size": Key(
        schema.Unset(tuple),
        Rule(
            "(height, width) in pixels, three sides of volumes, or None",
            lambda v: v is None or schema.is_size(v),
        ),
        "(height, width) that evaluation images are padded to, at the bottom and right; None: "
        "those of like size come together, padded to the largest of them.",
    ),
    "workers": Key(
        0,
        schema.at_least(0, "a number of processes, 0 or more"),
        "Worker processes; 0 reads in threads. Changes no result.",
    ),
    "prefetch": Key(
        2,
        schema.at_least(1, "a number of batches, 1 or more"),
        "Batches made ahead, by each worker.",
    ),
    "cache": Key(
        False,
        schema.SWITCH,
        "Keep decoded images in memory, in each worker; evaluation then reads in threads, so that "
        "they stay there from one evaluation to the next. Changes no result.",
    ),
}


def default(**changes: Any) -> ml_collections.ConfigDict:
    """Returns `config.data` with the defaults of `KEYS`, and `changes` applied.

    Raises:
        UserError: as `check`.
    """
    config = schema.defaults(KEYS)
    schema.check_keys(changes, list(KEYS), "config.data")
    with config.ignore_type():  # `check` says more than a failed cast
        config.update(changes)
    check(config)
    return config


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.data` of a run from before some of its keys: each defaults to what was."""
    full = default()
    with full.unlocked(), full.ignore_type():
        full.update(config)
    return full


def check(config: Any) -> None:
    """Raises UserError for what `KEYS` does not allow; see `schema.check`."""
    schema.check(config, KEYS, "config.data")
