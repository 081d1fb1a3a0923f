"""SceneParse150 (ADE20K, Zhou et al., CVPR 2017): 150 classes of scenes, as tfds stores it.

    python -m dilaff_jax.data.prepare --dataset scene_parse150 --source DIR --data_dir data

DIR holds `ADEChallengeData2016.zip`, or it unpacked: images/ and annotations/, each with training/
(20,210) and validation/ (2,000). Annotation value 0 ("other") is ignored, 1..150 become 0..149.

The features, the name and the split names (tfds calls the validation images "test") are those of
tfds's own builder, whose records can be read too, if they hold these annotations. Beware: tfds
downloads `annotations_instance.tar`, which are other labels (100 object categories in the red
channel, instance numbers in the green); such records are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dilaff_jax.data import builder, folders, images
from dilaff_jax.data.class_list import colormap
from dilaff_jax.data.folders import Pair
from dilaff_jax.labels import IGNORE_LABEL

CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag""".replace("\n    ", " ").split(
        ", "
    )
)
_ANNOTATIONS = {0: IGNORE_LABEL} | {i + 1: i for i in range(len(CLASSES))}


class Builder(builder.SegmentationBuilder):
    """Splits train, validation; see the module's docstring."""

    name = "scene_parse150"
    class_names = CLASSES
    colors = colormap(len(CLASSES) + 1)[1:]  # ours: two of the customary colours are equal
    image_key, label_key, name_key = "image", "annotation", ""
    stored_splits: ClassVar[Mapping[str, str]] = {"validation": "test"}
    read_lut = builder.lookup_table(_ANNOTATIONS)

    lists_sources = False

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """The 150-class annotations of the 2016 challenge."""
        root = self.unpacked("ADEChallengeData2016", ["ADEChallengeData2016.zip"])
        return {
            split: folders.pair_up(root, root / "images" / name, root / "annotations" / name)
            for split, name in (("train", "training"), ("validation", "validation"))
        }

    def label_map(self) -> Mapping[int, int]:
        """0 → ignored, 1..150 → 0..149."""
        return _ANNOTATIONS

    def features(self) -> dict[str, Any]:
        """As in tfds."""
        return {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "annotation": tfds.features.Image(encoding_format="png"),
        }

    def record(self, example: builder.Example, classes: np.ndarray) -> dict[str, Any]:
        """Annotation values are stored as they are."""
        label = images.encode_png(example.label.astype(np.uint8))
        return {"image": example.image, "annotation": label}
