"""Networks, inputs and commands that cannot be are refused, and nothing else is touched."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import dilaff_jax
from dilaff_jax.serving import predict_files, writer
from tests import data_files
from tests.data_files import picture
from tests.reliability import bad_files
from tests.reliability.place import cases, contents, refused
from tests.reliability.test_bad_archives import ARCHIVES
from tests.reliability.test_bad_configs import CONFIGS
from tests.reliability.test_bad_files import LABELS
from tests.reliability.test_bad_weights import WEIGHTS

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
    ("an empty folder", (), "source", "run", {}, "{AT}/source holds no image or video; known are .jpg, .jpeg, .jfif, .png, .bmp, .tif, .tiff, .webp, .gif, .ppm, .pgm, ...", ValueError),
    ("the output is the input", ("source/a.png",), "source", "source", {}, "input and output are both {AT}/source; give another folder as output", ValueError),
    ("an input is in the output", ("run/labels/a.png",), "run/labels/a.png", "run", {}, "the input {AT}/run/labels/a.png is in {AT}/run/labels, where output goes; give another folder as output", ValueError),
    ("the output is a file", ("source/a.png",), "source", "source/a.png", {}, "the output {AT}/source/a.png is a file; give a folder", ValueError),
    ("no video to propagate in", ("source/a.png",), "source", "run", {"temporal": True}, "temporal propagation was asked for, but {AT}/source holds no video", ValueError),
    ("in time without propagation", ("source/a.png",), "source", "run", {"temporal": True, "propagation": "without"}, "temporal propagation was asked for, and propagation='without'", ValueError),
)  # fmt: skip


@pytest.mark.parametrize(("inputs", "source", "output", "options", "message", "error"), PREDICT)
def test_inputs_that_cannot_be_predicted_are_refused(
    inputs, source, output, options, message, error, place, model
):
    make_input(place, *inputs)
    asked = writer.Options(place.at / output, **options)
    refused(place, lambda: predict_files.predict(model, place.at / source, asked), message, error)


def test_an_unusable_file_is_reported_and_stops_nothing(place, model):
    make_input(place, "source/good.png")
    unusable = bad_files.unusable_images()
    for name, (data, _) in unusable.items():
        (place.source / name).write_bytes(data)
    before = contents(place)
    summary = predict_files.predict(model, place.source, writer.Options(place.run))
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
            "UserError: config.optim.ema is 1.0; expected a number from 0 to below 1\n",
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
