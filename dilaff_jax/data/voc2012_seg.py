"""PASCAL VOC 2012 segmentation with the SBD annotations ("trainaug"): 21 classes with background.

    python -m dilaff_jax.data.prepare --dataset voc2012_seg --source DIR --data_dir data

DIR holds the official archives, or what is in them, unpacked:
    VOCtrainval_11-May-2012.tar  or  VOCdevkit/VOC2012/...  or  VOC2012/...
    benchmark.tgz                or  benchmark_RELEASE/dataset/...   (Hariharan et al., ICCV 2011)

`--counts 1464,0,1449` takes VOC alone, without SBD's files.

Splits: train 1,464 (VOC's own masks), aug 9,118 (SBD masks of the images that are in neither VOC
split) and validation 1,449. The customary training set of 10,582 is `config.train_split =
"train+aug"`. tfds's own `voc` has no segmentation masks.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dilaff_jax.data import builder, folders, images, mat
from dilaff_jax.data.class_list import colormap
from dilaff_jax.data.folders import Pair
from dilaff_jax.data.images import DataError

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@dataclasses.dataclass(frozen=True)
class VocOptions(builder.Options):
    """What the builder can be told."""

    counts: tuple[int, ...] = dataclasses.field(
        default=(1464, 9118, 1449),
        metadata={
            "help": "Expected examples of train, aug and validation; another count stops. 0 for "
            "aug: without SBD."
        },
    )


def load_sbd(path: pathlib.Path) -> np.ndarray:
    """Reads the category segmentation of an SBD `cls/NAME.mat`, int32 `[H, W]`.

    Raises:
        DataError: damaged file, or one without `GTcls.Segmentation`.
    """
    try:
        label = mat.read_field(path.read_bytes(), "GTcls", "Segmentation")
    except ValueError as e:
        raise DataError(
            f"{path}: not an SBD annotation with GTcls.Segmentation (damaged?): {e}"
        ) from e
    if label.ndim != 2 or not np.issubdtype(label.dtype, np.integer):
        raise DataError(f"{path}: GTcls.Segmentation is {label.dtype} {label.shape}: want [H, W]")
    return label.astype(np.int32)


def _names(file: pathlib.Path) -> list[str]:
    if not file.is_file():
        raise DataError(f"{file}: this list of image names is missing; is the archive complete?")
    return file.read_text().split()


class Builder(builder.SegmentationBuilder):
    """Splits train, aug, validation; see the module's docstring."""

    name = "voc2012_seg"
    class_names = CLASSES
    colors = colormap(len(CLASSES))
    options_type = VocOptions
    options: VocOptions

    lists_sources = False

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """VOC train and val, and SBD without both."""
        folder = "VOCdevkit/VOC2012"
        if not (self.source / folder).exists() and (self.source / "VOC2012").is_dir():
            folder = "VOC2012"
        voc = self.unpacked(folder, ["VOCtrainval_11-May-2012.tar"])
        lists = voc / "ImageSets" / "Segmentation"
        train, val = _names(lists / "train.txt"), _names(lists / "val.txt")
        masks = voc / "SegmentationClass"
        sbd, extra = None, set()
        if self.options.counts[1] != 0:
            sbd = self.unpacked("benchmark_RELEASE/dataset", ["benchmark.tgz"])
            extra = set(_names(sbd / "train.txt") + _names(sbd / "val.txt")) - set(train) - set(val)
        by_split = {
            "train": [Pair(n, self._jpeg(voc, sbd, n), masks / f"{n}.png") for n in sorted(train)],
            "aug": [
                Pair(n, self._jpeg(voc, sbd, n), sbd / "cls" / f"{n}.mat")
                for n in sorted(extra)
                if sbd
            ],
            "validation": [
                Pair(n, self._jpeg(voc, sbd, n), masks / f"{n}.png") for n in sorted(val)
            ],
        }
        counts = tuple(map(len, by_split.values()))
        if counts != tuple(self.options.counts):
            raise DataError(
                f"{self.source}: train, aug, validation have {counts} examples, not the official "
                f"{tuple(self.options.counts)}: the archives are incomplete or of another edition; "
                f"--counts {','.join(map(str, counts))} accepts them as they are"
            )
        return {split: pairs for split, pairs in by_split.items() if sbd or split != "aug"}

    def _jpeg(self, voc: pathlib.Path, sbd: pathlib.Path | None, name: str) -> pathlib.Path:
        """The image, from VOC 2012 or else from SBD, which is of VOC 2011."""
        choices = [voc / "JPEGImages" / f"{name}.jpg"]
        if sbd is not None:
            choices.append(sbd / "img" / f"{name}.jpg")
        for path in choices:
            if path.is_file():
                return path
        raise DataError(
            f"{name}: no image {' nor '.join(map(str, choices))}; is the archive complete?"
        )

    def read(self, item: Pair) -> builder.Example:
        """Reads one pair; the mask is a palette PNG (VOC) or a .mat file (SBD)."""
        for path in (item.image, item.label):
            self._inside(path)
        if not item.label.is_file():
            raise DataError(f"{item.label}: this mask is missing; is the archive complete?")
        image, size = images.load_image(item.image, self.options.image_bits)
        is_mat = item.label.suffix == ".mat"
        label = load_sbd(item.label) if is_mat else images.load_label(item.label)
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def _inside(self, path: pathlib.Path) -> None:
        root = self.scratch if path.is_relative_to(self.scratch) else self.source
        folders.inside(root, path)
