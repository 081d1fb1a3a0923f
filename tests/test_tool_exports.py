"""What annotation tools export goes in as it comes: each layout, written as the tool writes it."""

import json

import numpy as np
import pytest

from dilaff_jax.data import datasets, prepare
from dilaff_jax.data.data_config import default
from dilaff_jax.data.images import DataError
from tests import data_files

NAMES = ("background", "car", "tree")
COLORS = ((0, 0, 0), (250, 50, 83), (51, 221, 255))


def label(seed):
    return data_files.classes_map(classes=3, seed=seed)


def roboflow(root):
    for seed, split in enumerate(("train", "valid", "test")):
        for i in range(2):
            name = f"street-{i}_jpg.rf.0a{seed}"
            data_files.save(data_files.picture(seed=seed + i), root / split / f"{name}.jpg")
            data_files.save(label(seed + i), root / split / f"{name}_mask.png")
        rows = [f" {value}, {name}" for value, name in enumerate(NAMES)]
        (root / split / "_classes.csv").write_text("\n".join(["Pixel Value, Class", *rows]))
    (root / "README.roboflow.txt").write_text("Exported")
    return {"train": 2, "validation": 2, "test": 2}


def cvat(root):
    for i in range(40):
        data_files.save(data_files.picture(seed=i), root / "JPEGImages" / f"frame_{i:06d}.jpg")
        colors = np.array(COLORS, np.uint8)[label(i)]
        data_files.save(colors, root / "SegmentationClass" / f"frame_{i:06d}.png")
        data_files.save(colors, root / "SegmentationObject" / f"frame_{i:06d}.png")
    lines = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, COLORS, strict=True)]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("frame_000000\n")
    return


def labelme(root):
    for i in range(12):
        data_files.save(data_files.picture(seed=i), root / "JPEGImages" / f"{i}.jpg")
        data_files.save_palette(label(i), root / "SegmentationClassPNG" / f"{i}.png")
        (root / "SegmentationClass").mkdir(exist_ok=True)
        np.save(root / "SegmentationClass" / f"{i}.npy", label(i).astype(np.int32))
    (root / "class_names.txt").write_text("_background_\ncar\ntree")
    return


def supervisely(root):
    for split in ("train", "val"):
        for i in range(2):
            data_files.save(data_files.picture(seed=i), root / split / "img" / f"{i}.jpg")
            data_files.save(label(i), root / split / "masks_machine" / f"{i}.png")
            (root / split / "ann").mkdir(exist_ok=True)
            (root / split / "ann" / f"{i}.jpg.json").write_text("{}")
    (root / "meta.json").write_text("{}")
    colors = {"tree": [2, 2, 2], "car": [1, 1, 1]}
    (root / "obj_class_to_machine_color.json").write_text(json.dumps(colors))
    return {"train": 2, "validation": 2}


TOOLS = {"Roboflow": roboflow, "CVAT": cvat, "labelme": labelme, "Supervisely": supervisely}


def loaded(root, split):
    config = default(dataset="image_folder/mine", data_dir=str(root / "data"))
    return datasets.load(config, split)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_export_goes_in_as_it_comes(tool, tmp_path, capsys):
    splits = TOOLS[tool](tmp_path / "export")
    prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")
    assert f"is taken as an export of {tool}" in "".join(capsys.readouterr())
    train = loaded(tmp_path, "train")
    assert tuple(train.class_names) == NAMES
    if splits is None:
        assert len(train) + len(loaded(tmp_path, "validation")) == {"CVAT": 40, "labelme": 12}[tool]
    else:
        assert {name: len(loaded(tmp_path, name)) for name in splits} == splits
    seed = int(train.names[0].split("_")[-1]) if tool == "CVAT" else None
    seed = int(train.names[0]) if tool == "labelme" else seed or 0
    np.testing.assert_array_equal(train[0]["label"], label(seed))
    if tool == "CVAT":
        np.testing.assert_array_equal(train.colors, COLORS)
    # Again: it is ready, and nothing has changed.
    prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")


def test_one_data_set_of_supervisely_is_divided(tmp_path):
    supervisely(tmp_path / "export")
    (tmp_path / "export" / "train").rename(tmp_path / "export" / "ds0")
    for path in sorted((tmp_path / "export" / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")
    assert loaded(tmp_path, "train").names


def test_a_class_list_of_ones_own_or_an_option_comes_first(tmp_path):
    roboflow(tmp_path / "export")
    (tmp_path / "export" / "classes.txt").write_text("sky\nroad\nsea")
    with pytest.raises(DataError, match="found neither"):
        prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")


@pytest.mark.parametrize(
    ("tool", "file", "text", "message"),
    [
        (
            "Roboflow",
            "train/_classes.csv",
            "Pixel Value, Class\n0, a\n2, b",
            r"values are \[0, 2\]",
        ),
        (
            "Roboflow",
            "train/_classes.csv",
            "Pixel Value, Class\nx, a",
            "expected lines `VALUE, NAME`",
        ),
        ("Roboflow", "valid/_classes.csv", "Pixel Value, Class\n0, a", "other classes than"),
        ("CVAT", "labelmap.txt", "car:red", "'car:red': expected name:r,g,b::"),
        ("Supervisely", "obj_class_to_machine_color.json", "[1]", "expected {NAME:"),
        (
            "Supervisely",
            "obj_class_to_machine_color.json",
            '{"a": [1], "b": [1]}',
            "have one value",
        ),
    ],
)
def test_a_list_of_classes_that_cannot_be_is_refused_by_name(tool, file, text, message, tmp_path):
    TOOLS[tool](tmp_path / "export")
    (tmp_path / "export" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")


def test_an_image_without_its_mask_is_named(tmp_path):
    roboflow(tmp_path / "export")
    next((tmp_path / "export" / "train").glob("*_mask.png")).unlink()
    with pytest.raises(DataError, match=r"1 of 2 images have no mask: .*_mask"):
        prepare.prepare("image_folder/mine", tmp_path / "data", tmp_path / "export")
