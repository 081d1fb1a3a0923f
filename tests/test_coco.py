"""COCO's formats as their tools write them: what is drawn, what lies on top, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dilaff_jax.data import datasets, prepare
from dilaff_jax.data.coco_json import CocoOptions
from dilaff_jax.data.data_config import default
from dilaff_jax.data.images import DataError
from tests import data_files

pytest.importorskip("pycocotools", reason="needs the extra [coco]")

HEIGHT, WIDTH = 20, 30
CATEGORIES = [{"id": 3, "name": "tree"}, {"id": 1, "name": "car"}]
CAR, TREE = 1, 2  # as classes, after background
BOX = [4, 3, 14, 3, 14, 11, 4, 11]  # a polygon: x from 4 to 14, y from 3 to 11
WHOLE = [0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]


def annotation(number, image, category, shape, **more):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": shape, **more}


def image(number, name, height=HEIGHT, width=WIDTH):
    return {"id": number, "file_name": name, "height": height, "width": width}


def write(path, images, annotations, categories=CATEGORIES):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def runs(mask):
    """The uncompressed run lengths of a mask, column by column, starting with zeros."""
    values, counts, current = mask.T.ravel(), [], 0
    run = 0
    for value in values:
        if value != current:
            counts.append(run)
            run, current = 0, value
        run += 1
    return [*counts, run]


def simple(root, annotations, **more):
    """One image with these annotations in the layout of Label Studio; returns its options."""
    data_files.save(data_files.picture(HEIGHT, WIDTH), root / "images" / "a.png")
    write(root / "result.json", [image(1, "images/a.png")], annotations, **more)
    return root


def loaded(root, split="train"):
    return datasets.load(default(dataset="coco_json/mine", data_dir=str(root)), split)


def label(root, data, **options):
    """The label map of the only image."""
    options = {"categories": "car,tree"} | options
    prepare.prepare("coco_json/mine", data, root, CocoOptions(**options))
    return loaded(data)[0]["label"]


def box(top, bottom, left, right):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_polygons_become_classes_in_the_order_of_their_ids(tmp_path):
    found = label(simple(tmp_path / "e", [annotation(7, 1, 3, [BOX])]), tmp_path / "d")
    np.testing.assert_array_equal(found, np.where(box(3, 11, 4, 14), TREE, 0))
    assert loaded(tmp_path / "d").class_names == ("background", "car", "tree")


def test_an_object_of_several_polygons_is_one(tmp_path):
    other = [20, 12, 28, 12, 28, 18, 20, 18]
    found = label(simple(tmp_path / "e", [annotation(7, 1, 1, [BOX, other])]), tmp_path / "d")
    expected = box(3, 11, 4, 14) | box(12, 18, 20, 28)
    np.testing.assert_array_equal(found, np.where(expected, CAR, 0))


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_smaller_object_lies_on_top_in_whatever_order(order, tmp_path):
    objects = {1: annotation(1, 1, 3, [WHOLE]), 2: annotation(2, 1, 1, [BOX])}
    found = label(simple(tmp_path / "e", [objects[i] for i in order]), tmp_path / "d")
    np.testing.assert_array_equal(found, np.where(box(3, 11, 4, 14), CAR, TREE))


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_are_masks_and_crowds_are_ignored(compressed, tmp_path):
    from pycocotools import mask as coco

    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.4
    shape = {"size": [HEIGHT, WIDTH], "counts": runs(mask)}
    if compressed:
        shape = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        shape["counts"] = shape["counts"].decode()
    crowd = annotation(1, 1, 1, shape, iscrowd=1)
    other = annotation(2, 1, 3, [[22, 2, 24, 2, 24, 4, 22, 4]])
    found = label(simple(tmp_path / "e", [crowd, other]), tmp_path / "d")
    expected = np.where(mask, 255, 0)
    expected[2:4, 22:24] = TREE
    np.testing.assert_array_equal(found, expected)


def test_what_no_object_covers_can_be_ignored(tmp_path):
    root = simple(tmp_path / "e", [annotation(7, 1, 3, [BOX])])
    found = label(root, tmp_path / "d", uncovered="ignore")
    np.testing.assert_array_equal(found, np.where(box(3, 11, 4, 14), 1, 255))
    assert loaded(tmp_path / "d").class_names == ("car", "tree")


def test_categories_that_are_left_out_are_background(tmp_path):
    objects = [annotation(1, 1, 3, [WHOLE]), annotation(2, 1, 1, [BOX])]
    found = label(simple(tmp_path / "e", objects), tmp_path / "d", categories="car")
    np.testing.assert_array_equal(found, np.where(box(3, 11, 4, 14), 1, 0))


def test_a_polygon_that_leaves_its_image_is_cut_when_said_so(tmp_path):
    far = [-40, 5, 10, 5, 10, 60, -40, 60]
    root = simple(tmp_path / "e", [annotation(9, 1, 1, [far])])
    with pytest.raises(
        DataError, match=r"annotation 9 of images/a leaves .* by 40 pixels.*--outside cut"
    ):
        label(root, tmp_path / "d")
    found = label(root, tmp_path / "d", outside="cut")
    np.testing.assert_array_equal(found, np.where(box(5, 20, 0, 10), CAR, 0))


def test_a_slanted_polygon_covers_what_its_area_says(tmp_path):
    triangle = [2.0, 2.0, 28.0, 4.0, 10.0, 18.0]
    root = simple(tmp_path / "e", [annotation(1, 1, 1, [triangle])])
    x, y = np.array(triangle[::2]), np.array(triangle[1::2])
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert abs((label(root, tmp_path / "d") == CAR).sum() - area) < 0.06 * area


def coco(root):
    for split, count in (("train2017", 3), ("val2017", 2)):
        names = [f"{i:012d}.jpg" for i in range(count)]
        for name in names:
            data_files.save(data_files.picture(HEIGHT, WIDTH), root / split / name)
        images = [image(i + 7, name) for i, name in enumerate(names)]
        objects = [annotation(i, i + 7, 1 + 2 * (i % 2), [BOX]) for i in range(count)]
        write(root / "annotations" / f"instances_{split}.json", images, objects)


def cvat(root):
    coco(root)
    (root / "train2017").rename(root / "images")
    (root / "annotations" / "instances_train2017.json").rename(
        root / "annotations" / "instances_default.json"
    )
    (root / "annotations" / "instances_val2017.json").unlink()


def roboflow(root):
    coco(root)
    for split, name in (("train2017", "train"), ("val2017", "valid")):
        (root / split).rename(root / name)
        source = root / "annotations" / f"instances_{split}.json"
        source.rename(root / name / "_annotations.coco.json")


TOOLS = {
    "COCO": (coco, {"train": 3, "validation": 2}),
    "CVAT": (cvat, {"train": 3}),
    "Roboflow": (roboflow, {"train": 3, "validation": 2}),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_each_tools_layout_is_found_without_being_told(tool, tmp_path, capsys):
    make, splits = TOOLS[tool]
    make(tmp_path / "e")
    prepare.prepare(
        "coco_json/mine", tmp_path / "d", tmp_path / "e", CocoOptions(validation_share=0.0)
    )
    assert "is taken as an export of COCO instances" in capsys.readouterr().err
    assert {split: len(loaded(tmp_path / "d", split)) for split in splits} == splits
    first = loaded(tmp_path / "d")[0]["label"]
    np.testing.assert_array_equal(first, np.where(box(3, 11, 4, 14), CAR, 0))
    # Again: nothing has changed; with another file it has.
    options = CocoOptions(validation_share=0.0)
    prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path / "e", options)
    file = next((tmp_path / "e").rglob("*.json"))
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match="json"):
        prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path / "e", options)


def panoptic(root, segments, labels):
    """COCO panoptic: `labels` are segment numbers `[H, W]`."""
    data_files.save(data_files.picture(HEIGHT, WIDTH), root / "train2017" / "a.jpg")
    rgb = np.stack([labels % 256, labels // 256 % 256, labels // 65536], -1).astype(np.uint8)
    data_files.save(rgb, root / "annotations" / "panoptic_train2017" / "a.png")
    entry = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    write(root / "annotations" / "panoptic_train2017.json", [image(1, "a.jpg")], [entry])
    return root


def test_panoptic_segments_are_classes_and_what_has_none_is_ignored(tmp_path):
    numbers = np.zeros((HEIGHT, WIDTH), np.int64)
    numbers[:10, :15], numbers[10:, :15], numbers[10:, 15:] = 70_000, 300, 5
    segments = [
        {"id": 70_000, "category_id": 3},
        {"id": 300, "category_id": 1},
        {"id": 5, "category_id": 1, "iscrowd": 1},
    ]
    found = label(panoptic(tmp_path / "e", segments, numbers), tmp_path / "d")
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[:10, :15], expected[10:, :15] = 1, 0
    np.testing.assert_array_equal(found, expected)
    assert loaded(tmp_path / "d").class_names == ("car", "tree")
    with pytest.raises(DataError, match=r"segment 5 and 0 more are in the PNG and not in the JSON"):
        label(panoptic(tmp_path / "f", segments[:2], numbers), tmp_path / "g")


BOTH = [annotation(1, 1, 1, [BOX]), annotation(2, 1, 3, [BOX])]
WRONG = {
    "size": (
        {"images": [image(1, "images/a.png", WIDTH, HEIGHT)]},
        "20 x 30 .* its annotation is for 30 x 20",
    ),
    "missing": ({"images": [image(1, "b.png")]}, "1 of 1 images are not there: b.png"),
    "stranger": (
        {"annotations": [*BOTH, annotation(4, 5, 1, [BOX])]},
        "does not list, such as image_id 5",
    ),
    "category": (
        {"annotations": [*BOTH, annotation(1, 1, 9, [BOX])]},
        r"category_id 9, .*\[1, 3\]",
    ),
    "unused": (
        {"annotations": BOTH[:1]},
        "no annotation at all of the categories tree; .*--categories 'car'",
    ),
    "box": (
        {"annotations": [*BOTH, annotation(4, 1, 1, [], bbox=[1, 2, 3, 4])]},
        "annotation 4 .* only a box",
    ),
    "points": ({"annotations": [*BOTH, annotation(4, 1, 1, [[1, 2, 3, 4]])]}, "needs three points"),
    "nan": (
        {"annotations": [*BOTH, annotation(4, 1, 1, [[1, 2, 3, 4, float("nan"), 9]])]},
        "needs three points",
    ),
    "mask": (
        {"annotations": [*BOTH, annotation(4, 1, 1, {"size": [5, 5], "counts": [25]})]},
        r"mask of size \[5, 5\]; expected \(20, 30\)",
    ),
    "twice": (
        {
            "categories": [*CATEGORIES, {"id": 9, "name": "car"}],
            "annotations": [*BOTH, annotation(3, 1, 9, [BOX])],
        },
        "two categories have the name 'car'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_by_name(case, tmp_path):
    change, message = WRONG[case]
    data_files.save(data_files.picture(HEIGHT, WIDTH), tmp_path / "e" / "images" / "a.png")
    content = {"images": [image(1, "images/a.png")], "annotations": BOTH, "categories": CATEGORIES}
    (tmp_path / "e" / "result.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message):
        prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path / "e", CocoOptions())
    assert not list((tmp_path / "d").rglob("*.array_record*"))


@pytest.mark.parametrize("text", ["[]", "{", '{"images": [], "annotations": []}'])
def test_another_json_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="expected COCO's JSON"):
        prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path, CocoOptions())


def test_several_files_are_chosen_by_a_pattern(tmp_path):
    for split in ("dev", "final"):
        simple(tmp_path, [annotation(1, 1, 1, [BOX]), annotation(2, 1, 3, [BOX])])
        (tmp_path / "result.json").rename(tmp_path / f"labels-{split}.json")
    with pytest.raises(DataError, match=r"2 JSON files, labels-dev.json, .*--annotations"):
        prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path, CocoOptions())
    options = CocoOptions(annotations="labels-{split}.json")
    prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path, options)
    assert len(loaded(tmp_path / "d", "dev")) == len(loaded(tmp_path / "d", "final")) == 1


def test_an_image_outside_the_source_is_not_read(tmp_path):
    data_files.save(data_files.picture(HEIGHT, WIDTH), tmp_path / "secret.png")
    write(tmp_path / "e" / "result.json", [image(1, "../secret.png")], BOTH)
    with pytest.raises(DataError, match=r"leaves the source folder|are not there"):
        prepare.prepare("coco_json/mine", tmp_path / "d", tmp_path / "e", CocoOptions())


def test_the_command_prepares_it(tmp_path):
    coco(tmp_path / "e")
    command = ("-m", "dilaff_jax.data.prepare", "--dataset", "coco_json", "--name", "street")
    where = ("--source", tmp_path / "e", "--data_dir", tmp_path / "d")
    ran = subprocess.run(
        [sys.executable, *command, *map(str, where)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "coco_json/street" in ran.stdout


def test_folders_of_images_say_where_cocos_json_goes(tmp_path):
    coco(tmp_path / "e")
    with pytest.raises(DataError, match=r"no class list.*is COCO's JSON: --dataset coco_json"):
        prepare.prepare("image_folder/mine", tmp_path / "d", tmp_path / "e")
