"""What earlier versions wrote is still read: checkpoints, exported files, runs to be resumed."""

import json
import pathlib
import shutil

import cv2
import jax
import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import train
from dilaff_jax.data import data_config, datasets
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import checkpoint
from dilaff_jax.serving import network
from tests import data_files, running

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "version_0_1_0"


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def image():
    return cv2.imread(str(FOLDER.parents[1] / "images" / "coffee.png"))[:96, :128, ::-1].copy()


@pytest.mark.parametrize(("name", "prefix"), [("run", ""), ("export.zip", "export_")])
def test_a_run_and_an_exported_file_give_what_they_gave(name, prefix, image, expected):
    result = dilaff_jax.load(FOLDER / name)(image)
    # Other processors round otherwise; a pixel between two classes may then change sides.
    np.testing.assert_allclose(result.probs[::8, ::8], expected[f"{prefix}probs"], atol=1e-4)
    assert np.mean(result.labels != expected[f"{prefix}labels"]) < 1e-3
    assert len(np.unique(result.labels)) == 3
    np.testing.assert_allclose(result.affinity_logits[::4, ::4], expected["affinity"], atol=1e-3)
    assert np.mean(result.plain != expected["plain"]) < 1e-3


def test_the_data_of_a_run_are_still_what_its_config_says(tmp_path):
    config = network.read_config(FOLDER / "run")
    assert set(config.data) == set(data_config.KEYS)
    config.data.data_dir = str(data_files.tiny_shapes(tmp_path))
    config.data.dataset = "shapes/tiny"
    assert len(datasets.load(config.data, "validation")) == 7
    # What the file says stays.
    stored = json.loads((FOLDER / "run/config.json").read_text())["data"]
    kept = network.read_config(FOLDER / "run").data
    assert json.loads(kept.to_json())["crop_size"] == stored["crop_size"]
    assert kept.pad_rgb == tuple(stored["pad_rgb"])


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path, expected):
    workdir = tmp_path / "run"
    shutil.copytree(FOLDER / "interrupted", workdir)
    config = running.make_config(data_files.tiny_shapes(tmp_path / "data"))
    config.parallel.devices = 1
    train.train_and_evaluate(config, workdir)
    assert [line["step"] for line in running.lines(workdir)] == [2, 4, 4, 6, 6]
    like = segmenter.abstract_variables(segmenter.build(segmenter.config_of_run(config), 8))
    step, variables = checkpoint.read_variables(workdir, like, latest=True)
    assert step == 6
    final = {
        "/".join(str(key.key) for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(variables)
    }
    wanted = {k.removeprefix("final/"): v for k, v in expected.items() if k.startswith("final/")}
    assert final.keys() == wanted.keys()
    for name, value in final.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-5, rtol=1e-4, err_msg=name)
