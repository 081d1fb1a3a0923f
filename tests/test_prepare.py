"""The command: what it prints, what it refuses, and that it can be interrupted anywhere."""

import fcntl
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from dilaff_jax.data import contact_sheet, data_config, datasets, prepare, shapes
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from tests.data_files import classes_map, image_folder, picture, save, tiny_shapes


def command(*arguments):
    return [sys.executable, "-m", "dilaff_jax.data.prepare", *map(str, arguments)]


def run(*arguments, cwd=None):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, cwd=cwd, env=environment
    )


def options(**kwargs):
    return datasets.builder_class("image_folder").options_type(**kwargs)


def prepare_folder(tmp_path, **kwargs):
    return prepare.prepare("image_folder/x", tmp_path / "out", tmp_path / "in", options(**kwargs))


def load(data_dir, dataset="image_folder/x", split="train"):
    return datasets.load(data_config.default(dataset=dataset, data_dir=str(data_dir)), split)


# The command line.


def test_one_command_prepares_reports_and_draws(tmp_path):
    image_folder(tmp_path / "in", ("a", "b", "c"))
    (tmp_path / "cwd").mkdir()
    done = run(
        *("--dataset", "image_folder", "--name", "pets", "--source", tmp_path / "in"),
        *("--data_dir", tmp_path / "out", "--inspect"),
        cwd=tmp_path / "cwd",
    )
    assert done.returncode == 0, done.stderr
    assert "image_folder/pets train: 3 images, 20 x 30" in done.stdout
    labels = [classes_map(seed=s) for s in range(3)]
    for index in range(3):
        pixels = sum(int((label == index).sum()) for label in labels)
        assert re.search(rf"class{index} +│ +{pixels} ", done.stdout.replace(",", ""))
    assert 'config.data.dataset = "image_folder/pets"' in done.stdout
    assert "3/3" in done.stderr, "a progress bar with counts"
    sheet = cv2.imread(str(tmp_path / "out/inspect/image_folder_pets_train.png"))
    assert sheet.shape[1] == 1440
    assert not list((tmp_path / "cwd").iterdir()), "written outside data_dir"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "in", "out"]
    again = run(
        *("--dataset", "image_folder", "--name", "pets", "--source", tmp_path / "in"),
        *("--data_dir", tmp_path / "out"),
    )
    assert again.returncode == 0
    assert "is ready in" in again.stdout
    assert "image/s" not in again.stderr, "a prepared set is not prepared again"


def test_shapes_needs_no_source_and_takes_its_options(tmp_path):
    done = run(
        *("--dataset", "shapes", "--size", 32, "--train=5", "--validation=3", "--test=2"),
        *("--data_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert [len(load(tmp_path, "shapes", s)) for s in ("train", "validation", "test")] == [5, 3, 2]


def test_voc_counts_are_read_as_numbers(tmp_path):
    to = ("--source", tmp_path, "--data_dir", tmp_path / "data")
    done = run("--dataset=voc2012_seg", "--counts=1,2,3", *to)
    assert done.returncode == 1
    assert "VOCtrainval_11-May-2012.tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_options_of_the_data_set():
    done = run("--dataset", "image_folder", "--help")
    assert "--mask_values" in done.stdout
    assert "--[no]color_masks" in done.stdout
    assert "your own images and masks" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "want --dataset NAME --data_dir DIR"),
        (
            ["--dataset=nonsense"],
            "no data set 'nonsense'; available: annotation_json, band_folder, camvid",
        ),
        (["--dataset=camvid", "--data_dir=x"], "camvid needs --source"),
        (["--dataset=camvid", "--data_dir=x", "--source=/none"], "--source=/none: no such folder"),
        (["--dataset=shapes", "--data_dir=x", "stray"], "unexpected stray"),
        (["--dataset=shapes", "--data_dir=x", "--name=../x"], "want letters, digits"),
        (["--dataset=shapes", "--data_dir=x", "--size=8"], "--size=8: want 32 to 2048"),
        (["--dataset=cityscapes", "--data_dir=x", "--source=/tmp", "--name=y"], "leave out --name"),
    ],
)
def test_bad_arguments_give_one_line_and_no_traceback(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# Files that cannot be used.


def value_outside(root):
    label = classes_map()
    label[4, 3:8], label[9, 1] = 7, 200
    save(label, root / "train/labels/b.png")


def missing_mask(root):
    (root / "train/labels/b.png").unlink()


def other_size(root):
    save(classes_map(20, 31), root / "train/labels/b.png")


def truncated(root):
    path = root / "train/images/b.jpg"
    path.write_bytes(path.read_bytes()[:900])


def linked_away(root):
    (root / "train/images/b.jpg").unlink()
    (root / "train/images/b.jpg").symlink_to("/etc/hostname")


def rotated(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(picture(), root / "train/images/b.jpg", exif=exif)


def rgb_mask(root):
    save(picture(), root / "train/labels/b.png")


def lossy_mask(root):
    (root / "train/labels/b.png").unlink()
    save(classes_map(), root / "train/labels/b.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            value_outside,
            r"labels/b\.png: value 7 \(5 pixels\), value 200 \(1 pixels\) outside the classes: "
            r"allowed are 0\.\.2, 255 .*--mask_values 7:CLASS, or 7:255 to ignore",
        ),
        (missing_mask, r"1 of 3 images have no mask: .*labels/b"),
        (other_size, r"labels/b\.png: the mask is 20 x 31, its image .*b\.jpg is 20 x 30"),
        (truncated, r"images/b\.jpg: not a readable image \(truncated"),
        (linked_away, r"images/b\.jpg: is a symbolic link, or behind one, that leaves"),
        (rotated, r"mask is 20 x 30, its image .* is 30 x 20 \(height x width, after any EXIF"),
        (rgb_mask, r"labels/b\.png: a RGB picture is not a label map.*--color_masks"),
        (lossy_mask, r"labels/b\.jpg: JPEG is lossy"),
    ],
)
def test_a_bad_file_stops_it_with_name_cause_and_remedy(tmp_path, damage, message):
    root = image_folder(tmp_path / "in")
    damage(root)
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path)
    with pytest.raises(ValueError, match="not prepared"):
        load(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*")), "half a data set is left behind"
    assert not (tmp_path / "out/image_folder/.scratch").exists()


def test_the_option_that_the_message_names_helps(tmp_path):
    value_outside(image_folder(tmp_path / "in"))
    prepare_folder(tmp_path, mask_values="7:1,200:255")
    label = load(tmp_path / "out")[1]["label"]
    assert (label[4, 3:8] == 1).all()
    assert label[9, 1] == 255


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "want FOUND:MEANT"),
        ("a:b", "want FOUND:MEANT"),
        ("7:5", r"5 is no value of this data set; allowed are 0\.\.2, 255"),
        ("3000000000:1", "values are whole numbers of 32 bits"),
    ],
)
def test_bad_mask_values_are_refused(tmp_path, text, message):
    image_folder(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path, mask_values=text)


def test_all_pixel_formats_of_images_go_through(tmp_path):
    root = image_folder(tmp_path / "in", ("a",))
    label = classes_map()
    for name, mode in (("grey", "L"), ("alpha", "RGBA"), ("cmyk", "CMYK"), ("pal", "P")):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(picture()).convert(mode).save(root / f"train/images/{name}.{suffix}")
        save(label, root / f"train/labels/{name}.png")
    save(picture()[..., 0].astype(np.uint16) * 257, root / "train/images/deep.png")
    save(label, root / "train/labels/deep.png")
    prepare_folder(tmp_path)
    source = load(tmp_path / "out")
    assert source.names == ["a", "alpha", "cmyk", "deep", "grey", "pal"]
    for i in range(6):
        assert source[i]["image"].shape == (20, 30, 3)
    np.testing.assert_array_equal(source[1]["image"], picture())


# Again, and interrupted.


def test_other_options_need_overwrite_or_a_name(tmp_path):
    root = image_folder(tmp_path / "in")
    prepare_folder(tmp_path)
    with pytest.raises(ValueError, match=r"mask_values='', now '2:1'.*--overwrite .* or --name"):
        prepare_folder(tmp_path, mask_values="2:1")
    prepare.prepare(
        "image_folder/x", tmp_path / "out", root, options(mask_values="2:1"), overwrite=True
    )
    assert load(tmp_path / "out")[0]["label"].max() == 1


def test_a_failed_overwrite_keeps_what_was_there(tmp_path):
    root = image_folder(tmp_path / "in")
    prepare_folder(tmp_path)
    truncated(root)
    with pytest.raises(DataError, match="truncated"):
        prepare.prepare("image_folder/x", tmp_path / "out", root, overwrite=True)
    assert len(load(tmp_path / "out")) == 3


def test_two_at_once_are_refused(tmp_path):
    image_folder(tmp_path / "in")
    (tmp_path / "out/image_folder").mkdir(parents=True)
    with open(tmp_path / "out/image_folder/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing this"):
            prepare_folder(tmp_path)
    prepare_folder(tmp_path)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_may_be_killed_and_repeated(tmp_path, number):
    arguments = ("--dataset", "shapes", "--size", "64", "--train", "3000", "--data_dir", tmp_path)
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background is told to ignore Ctrl-C, and passes that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: list((tmp_path / "shapes/.scratch").rglob("incomplete.*")))
        time.sleep(0.3)
        process.send_signal(number)
    finally:
        process.wait(30)
        process.stderr.close()
    with pytest.raises(ValueError, match="not prepared"):
        load(tmp_path, "shapes")
    small = shapes.ShapesOptions(size=32, train=4, validation=2, test=2)
    prepare.prepare("shapes", tmp_path, options=small)
    assert len(load(tmp_path, "shapes")) == 4
    left = sorted(p.name for p in (tmp_path / "shapes").iterdir())
    assert left == [".lock", "1.0.0"]


# Pictures.


def test_the_contact_sheet_shows_image_overlay_and_labels(tmp_path):
    tiny_shapes(tmp_path)
    source = load(tmp_path, "shapes/tiny")
    sheet = contact_sheet.draw(source, count=3, side=96)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * 3 * 96
    legend = len(sheet) - 2 * (18 + 96)
    top = legend + 18
    image, label = source[0]["image"], source[0]["label"]
    np.testing.assert_array_equal(sheet[top : top + 96 : 3, 0:96:3], image)
    painted = contact_sheet.paint(label, source.colors)
    np.testing.assert_array_equal(sheet[top : top + 96 : 3, 192:288:3], painted)


def test_painting_uses_the_colours_and_white_for_ignored():
    painted = contact_sheet.paint(
        np.array([[0, 1, 255]], np.uint8), np.array([[1, 2, 3], [4, 5, 6]])
    )
    assert painted.tolist() == [[[1, 2, 3], [4, 5, 6], [255, 255, 255]]]


# What it was prepared from.


def change_mask(root):
    save(np.zeros((20, 30), np.uint8), root / "train/labels/b.png")


def add_image(root):
    save(picture(), root / "train/images/d.jpg")
    save(np.zeros((20, 30), np.uint8), root / "train/labels/d.png")


def remove_image(root):
    (root / "train/images/a.jpg").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_mask, r"1 file \(train/labels/b.png\) changed"),
        (add_image, r"2 files \(train/images/d.jpg, train/labels/d.png\) added"),
        (remove_image, r"2 files \(train/images/a.jpg, train/labels/a.png\) gone"),
        (lambda root: (root / "classes.txt").write_text("x\ny\nz\n"), r"\(classes.txt\) changed"),
    ],
)
def test_a_source_that_has_changed_is_not_ready(change, said, tmp_path):
    root = image_folder(tmp_path / "in")
    prepare_folder(tmp_path)
    prepare_folder(tmp_path)
    change(root)
    with pytest.raises(UserError, match=rf"prepared from other files; .*{said}: use --overwrite"):
        prepare_folder(tmp_path)
    prepare.prepare("image_folder/x", tmp_path / "out", root, overwrite=True)
    prepare_folder(tmp_path)


def test_another_source_is_compared_by_content(tmp_path):
    image_folder(tmp_path / "in")
    prepare_folder(tmp_path)
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.*"):
        os.utime(file, (1, 1))
    prepare.prepare("image_folder/x", tmp_path / "out", tmp_path / "copy")
    change_mask(tmp_path / "copy")
    with pytest.raises(UserError, match="changed"):
        prepare.prepare("image_folder/x", tmp_path / "out", tmp_path / "copy")


@pytest.mark.parametrize("data_dir", ["in/data", "in", "."])
def test_what_is_prepared_beside_its_source_is_no_source(data_dir, tmp_path):
    root = image_folder(tmp_path / "in")
    for _ in range(2):
        prepare.prepare("image_folder/x", tmp_path / data_dir, root)
    change_mask(root)
    with pytest.raises(UserError, match="changed"):
        prepare.prepare("image_folder/x", tmp_path / data_dir, root)


def test_a_set_from_before_files_were_recorded_is_taken_and_that_is_said(tmp_path, capsys):
    image_folder(tmp_path / "in")
    target = prepare_folder(tmp_path)
    (target / "source_files.json").unlink()
    assert prepare_folder(tmp_path) == target
    assert "did not record its files" in capsys.readouterr().err


def test_files_that_are_not_used_are_named(tmp_path):
    root = image_folder(tmp_path / "in")
    for name in ("images/x.heic", "labels/lonely.png", "images/.ipynb_checkpoints/a.jpg"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        save(classes_map(), root / "train" / name) if name.endswith("png") else (
            (root / "train" / name).write_bytes(b"?")
        )
    result = run(
        *("--dataset", "image_folder", "--name", "x", "--source", root),
        *("--data_dir", tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    assert "not used: 2 files (train/images/x.heic, train/labels/lonely.png)" in result.stdout


def test_a_jfif_image_is_a_jpeg(tmp_path):
    root = image_folder(tmp_path / "in")
    (root / "train/images/a.jpg").rename(root / "train/images/a.jfif")
    prepare_folder(tmp_path)
    assert load(tmp_path / "out").names == ["a", "b", "c"]


def test_a_line_ignore_keeps_the_numbers_of_the_others(tmp_path):
    root = image_folder(tmp_path / "in", classes=4)
    (root / "classes.txt").write_text("road\nignore\nsky\ntree\n")
    prepare_folder(tmp_path)
    source = load(tmp_path / "out")
    assert source.class_names == ("road", "sky", "tree")
    raw = np.asarray(Image.open(root / "train/labels/a.png"))
    expected = np.array([0, 255, 1, 2])[raw]
    np.testing.assert_array_equal(source[0]["label"], expected)


@pytest.mark.parametrize("value", [-1, -100, 70000])
def test_values_beyond_16_bits_are_mapped_as_the_message_says(value, tmp_path):
    root = image_folder(tmp_path / "in")
    labels = classes_map().astype(np.int32)
    labels[:5] = value
    (root / "train/labels/a.png").unlink()
    Image.fromarray(labels).save(root / "train/labels/a.tif")
    arguments = ("--dataset", "image_folder", "--name", "x", "--source", root)
    arguments = (*arguments, "--data_dir", tmp_path / "out")
    refused = run(*arguments)
    assert refused.returncode == 1
    advice = re.search(r"or (\S+:255) to ignore it", refused.stderr)[1]
    done = run(*arguments, "--mask_values", advice)
    assert done.returncode == 0, done.stderr
    label = load(tmp_path / "out")[0]["label"]
    assert (label[:5] == 255).all()
    np.testing.assert_array_equal(label[5:], classes_map()[5:])


def test_images_of_12_bits_are_asked_about(tmp_path):
    root = image_folder(tmp_path / "in")
    deep = np.full((20, 30), 4095, np.uint16)
    (root / "train/images/a.jpg").unlink()
    cv2.imwrite(str(root / "train/images/a.png"), deep)
    with pytest.raises(DataError, match="--image_bits=12"):
        prepare_folder(tmp_path)
    prepare_folder(tmp_path, image_bits=12)
    assert load(tmp_path / "out")[0]["image"].min() == 255
