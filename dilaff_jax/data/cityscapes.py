"""Cityscapes: 19 classes of street scenes (Cordts et al., CVPR 2016), as tfds stores it.

    python -m dilaff_jax.data.prepare --dataset cityscapes --source DIR --data_dir data

writes `cityscapes/semantic_segmentation` with the features of tfds's own builder, which needs
TensorFlow; a copy that tfds prepared elsewhere (with file_format='array_record') reads the same.
Records hold the official label ids; the 19 train ids are taken at reading, the rest is ignored.

DIR holds, from cityscapes-dataset.com, `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`
or the folders `leftImg8bit` and `gtFine`. Splits: train 2,975, validation 500. The public masks of
the test split are blank, so it is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dilaff_jax.data import builder, folders, images
from dilaff_jax.data.folders import Pair
from dilaff_jax.labels import IGNORE_LABEL

# Official table: (label id, class, colour); the train id is the position.
_TRAIN_IDS = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
_LABEL_IDS = dict.fromkeys((*range(34), 255), IGNORE_LABEL)  # 255: licence plate, -1 in the table
_LABEL_IDS |= {label_id: index for index, (label_id, _, _) in enumerate(_TRAIN_IDS)}


class Builder(builder.SegmentationBuilder):
    """Splits train, validation; see the module's docstring."""

    name = "cityscapes"
    config_name = "semantic_segmentation"
    class_names = tuple(name for _, name, _ in _TRAIN_IDS)
    colors = tuple(color for _, _, color in _TRAIN_IDS)
    image_key, label_key, name_key = "image_left", "segmentation_label", "image_id"
    read_lut = builder.lookup_table(_LABEL_IDS)

    lists_sources = False

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """Fine annotations."""
        sources = (
            self.unpacked(name, [f"{name}_trainvaltest.zip"]) for name in ("leftImg8bit", "gtFine")
        )
        left, fine = sources
        by_split = {}
        for split, directory in (("train", "train"), ("validation", "val")):
            by_split[split] = [
                Pair(p.name.split("/")[-1], p.image, p.label)
                for p in folders.pair_up(
                    self.scratch if left.is_relative_to(self.scratch) else self.source,
                    left / directory,
                    fine / directory,
                    image_suffix="_leftImg8bit",
                    label_suffix="_gtFine_labelIds",
                )
            ]
        return by_split

    def label_map(self) -> Mapping[int, int]:
        """Official label ids → train ids."""
        return _LABEL_IDS

    def features(self) -> dict[str, Any]:
        """As in tfds."""
        image = tfds.features.Image(shape=(1024, 2048, 3), encoding_format="png")
        label = tfds.features.Image(shape=(1024, 2048, 1), encoding_format="png", use_colormap=True)
        return {"image_id": tfds.features.Text(), "image_left": image, "segmentation_label": label}

    def record(self, example: builder.Example, classes: np.ndarray) -> dict[str, Any]:
        """Label ids are stored as they are."""
        label = images.encode_png(example.label.astype(np.uint8))
        return {
            "image_id": example.name,
            "image_left": example.image,
            "segmentation_label": label,
        }
