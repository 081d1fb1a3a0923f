"""What labelme saves and Label Studio exports: what is drawn, what lies on top, what is refused."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from dilaff_jax.data import datasets, prepare
from dilaff_jax.data.annotation_json import AnnotationOptions
from dilaff_jax.data.data_config import default
from dilaff_jax.data.images import DataError
from tests import data_files

pytest.importorskip("pycocotools", reason="needs the extra [coco]")

HEIGHT, WIDTH = 20, 40
CAR, TREE = 1, 2  # as classes, after background
BOX = [[4, 3], [14, 3], [14, 11], [4, 11]]


def box(top, bottom, left, right):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def label(root, data, split="train", **options):
    options = {"validation_share": 0.0} | options
    prepare.prepare("annotation_json/mine", data, root, AnnotationOptions(**options))
    source = datasets.load(default(dataset="annotation_json/mine", data_dir=str(data)), split)
    return source[0]["label"], source.class_names


# labelme.


def labelme(root, shapes, name="a", **more):
    """One image and its file; returns the folder."""
    data_files.save(data_files.picture(HEIGHT, WIDTH), root / f"{name}.png")
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png"}
    content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH} | more
    (root / f"{name}.json").write_text(json.dumps(content))
    return root


def shape(name, points, kind="polygon", **more):
    return {"label": name, "points": points, "shape_type": kind, "group_id": None, **more}


def test_labelmes_polygons_are_drawn_in_their_order(tmp_path):
    shapes = [shape("tree", BOX), shape("car", [[10, 5], [30, 5], [30, 9], [10, 9]])]
    found, names = label(labelme(tmp_path / "in", shapes), tmp_path / "d")
    expected = np.where(box(3, 11, 4, 14), TREE, 0)
    expected[box(5, 9, 10, 30)] = CAR
    np.testing.assert_array_equal(found, expected)
    assert names == ("background", "car", "tree")


def test_labelmes_other_shapes(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 255
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, format="PNG")
    shapes = [
        shape("car", [[14, 11], [4, 3]], "rectangle"),
        shape("tree", [[25, 10], [25, 15]], "circle"),
        shape("car", [[30, 1], [35, 4]], "mask", mask=base64.b64encode(stream.getvalue()).decode()),
        shape("__ignore__", [[0, 18], [40, 18], [40, 20], [0, 20]]),
    ]
    found, _ = label(labelme(tmp_path / "in", shapes), tmp_path / "d")
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    circle = (x - 25) ** 2 + (y - 10) ** 2
    assert (found[circle < 4.3**2] == TREE).all()
    assert (found[(circle > 5.7**2) & (x > 15) & (x < 30) & (y < 17)] == 0).all()
    np.testing.assert_array_equal(found[:, :14] == CAR, box(3, 11, 4, 14)[:, :14])
    np.testing.assert_array_equal(found[:6, 29:] == CAR, box(2, 4, 32, 35)[:6, 29:])
    assert (found[18:] == 255).all()


def test_folders_are_splits_and_options_choose(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        more = shape("pole", [[30, 5], [35, 5], [35, 9], [30, 9]]), shape("sky", BOX)
        labelme(tmp_path / "in" / split, [shape("car", BOX), *more])
    found, names = label(
        tmp_path / "in", tmp_path / "d", "validation", classes="pole,car", uncovered="ignore"
    )
    expected = np.where(box(3, 11, 4, 14), 1, 255)
    expected[box(5, 9, 30, 35)] = 0
    np.testing.assert_array_equal(found, expected)
    assert names == ("pole", "car")


@pytest.mark.parametrize(
    ("shapes", "more", "reason"),
    [
        ([shape("a", [[1, 1], [5, 5]], "line")], {}, "shape 0 of a is a line of 2 points"),
        ([shape("a", [[1, 1], [5, 5]])], {}, "a polygon needs three points or more"),
        ([shape("a", [[1, 1], [90, 1], [5, 5]])], {}, "leaves its image .* --outside cut"),
        ([shape("a", BOX)], {"imageHeight": 21}, r"annotation is for 21 x 40"),
        ([shape("a", BOX)], {"imagePath": "b.png"}, r"its image b\.png is not there"),
        ([shape("a", [[1, 1], [3, 3]], "mask", mask="?")], {}, "its mask is no PNG in base64"),
    ],
)
def test_labelmes_files_that_cannot_be_meant_are_refused(tmp_path, shapes, more, reason):
    root = labelme_root(tmp_path)
    with pytest.raises(DataError, match=reason):
        label(labelme(root, shapes, **more), tmp_path / "d")


def labelme_root(folder):
    (folder / "in").mkdir()
    return folder / "in"


def test_outside_may_be_cut(tmp_path):
    root = labelme(tmp_path / "in", [shape("car", [[30, 5], [60, 5], [60, 9], [30, 9]])])
    found, _ = label(root, tmp_path / "d", outside="cut")
    np.testing.assert_array_equal(found == CAR, box(5, 9, 30, 40))


# Label Studio.


def packed(values, lengths=(3, 4, 8, 16)):
    """RGBA values as its brushes keep them: runs of equal ones, written after its description."""
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in lengths)
    at = 0
    while at < len(values):
        end = at
        while end < len(values) and values[end] == values[at] and end - at < 2 ** lengths[3]:
            end += 1
        kind = next(k for k, n in enumerate(lengths) if end - at <= 2**n)
        single = end - at == 1
        bits += ("0" if single else "1") + f"{kind:02b}" + f"{end - at - 1:0{lengths[kind]}b}"
        bits += f"{values[at]:08b}"
        at = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def region(kind, name, **value):
    return {
        "type": kind,
        "value": {**value, kind: [name]},
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "to_name": "image",
    }


def task(*regions, image="/data/upload/1/0a1b2c3d-a.png", **more):
    done = {"result": list(regions), "was_cancelled": False}
    return {"id": 7, "data": {"image": image}, "annotations": [done], **more}


def studio(root, *tasks):
    data_files.save(data_files.picture(HEIGHT, WIDTH), root / "images" / "a.png")
    (root / "project-1.json").write_text(json.dumps(list(tasks)))
    return root


def test_label_studios_regions_are_drawn_in_their_order(tmp_path):
    alpha = box(12, 16, 2, 9)
    rgba = np.repeat(np.where(alpha, 255, 0)[..., None], 4, axis=-1).astype(np.uint8)
    rgba[0, 0, :3] = 9  # colour without alpha is nothing
    regions = (
        region("polygonlabels", "tree", points=[[10, 15], [35, 15], [35, 55], [10, 55]]),
        region("rectanglelabels", "car", x=25, y=25, width=50, height=20, rotation=0),
        region("brushlabels", "car", format="rle", rle=packed(rgba.ravel().tolist())),
        {"type": "choices", "value": {"choices": ["good"]}},
    )
    found, names = label(studio(tmp_path / "in", task(*regions)), tmp_path / "d")
    expected = np.where(box(3, 11, 4, 14), TREE, 0)
    expected[box(5, 9, 10, 30)] = CAR
    expected[alpha] = CAR
    np.testing.assert_array_equal(found, expected)
    assert names == ("background", "car", "tree")


def test_rectangles_turn_about_their_corner_and_ellipses_about_their_centre(tmp_path):
    regions = (
        # A quarter turn of 10 x 4 pixels at (20, 2): down from there, and to the left.
        region("rectanglelabels", "car", x=50, y=10, width=25, height=20, rotation=90),
        region("ellipselabels", "tree", x=75, y=50, radiusX=10, radiusY=40, rotation=90),
    )
    found, _ = label(studio(tmp_path / "in", task(*regions)), tmp_path / "d")
    np.testing.assert_array_equal(found == CAR, box(2, 12, 16, 20))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((x - 30) / 8) ** 2 + ((y - 10) / 4) ** 2
    assert (found[inside < 0.8] == TREE).all()
    assert (found[(inside > 1.25) & (x > 21)] == 0).all()


def test_of_several_annotations_the_ground_truth_counts(tmp_path):
    one = task(region("polygonlabels", "car", points=[[0, 0], [50, 0], [50, 50]]))
    truth = {
        "result": [region("polygonlabels", "car", points=[[0, 0], [100, 0], [100, 100], [0, 100]])],
        "ground_truth": True,
    }
    one["annotations"].append(truth)
    found, _ = label(studio(tmp_path / "in", one), tmp_path / "d")
    assert (found == CAR).all()


BRUSH = {"format": "rle", "rle": packed([255] * (4 * HEIGHT * WIDTH))}


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([task(region("keypointlabels", "a", x=1, y=1))], "has keypointlabels, which cover no"),
        ([task(image="http://there/b.png")], r"the image of task 7 is not there: http://there/b"),
        ([{**task(), "annotations": [{"result": []}] * 2}], "task 7 has 2 annotations"),
        ([task(region("brushlabels", "a", **BRUSH | {"format": "png"}))], "a brush of format png"),
        ([task(region("brushlabels", "a", **BRUSH | {"rle": [0, 0, 1]}))], "its brush is damaged"),
        (
            [task(region("brushlabels", "a", format="rle", rle=packed([1] * 8)))],
            "its brush is not of the image's size",
        ),
        ([task(region("polygonlabels", "a", points=[[0, 0], [150, 0], [9, 9]]))], "leaves its im"),
        ([], "found no .json"),
    ],
)
def test_label_studios_exports_that_cannot_be_meant_are_refused(tmp_path, tasks, reason):
    with pytest.raises(DataError, match=reason):
        label(studio(tmp_path / "in", *tasks), tmp_path / "d")


def test_two_exports_and_files_of_both_tools_are_refused(tmp_path):
    car = task(region("polygonlabels", "car", points=[[0, 0], [50, 0], [50, 50]]))
    root = studio(tmp_path / "in", car)
    (root / "again.json").write_text((root / "project-1.json").read_text())
    with pytest.raises(DataError, match=r"2 exports, again\.json, project-1\.json; keep one"):
        label(root, tmp_path / "d")
    (root / "again.json").unlink()
    labelme(root, [shape("car", BOX)])
    with pytest.raises(
        DataError, match=r"both labelme's files, such as a\.json, and Label Studio's"
    ):
        label(root, tmp_path / "d")
    (root / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        label(root, tmp_path / "d")


def test_unknown_classes_are_named(tmp_path):
    root = labelme(tmp_path / "in", [shape("car", BOX)])
    with pytest.raises(DataError, match="--classes has bus; there are car"):
        label(root, tmp_path / "d", classes="bus")
