"""The five lines of Python: loading, results, and refinement of anybody's logits."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dilaff_jax
from dilaff_jax import affinity, propagate
from dilaff_jax.data import class_list
from tests import data_files
from tests import tiny_run as runs

IMAGE = data_files.picture(40, 48)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (2, 5, 6, 3)).astype(np.float32)
EDGES = RNG.normal(0, 2, (2, 10, 12, 16)).astype(np.float32)


def test_importing_the_package_imports_nothing():
    code = (
        "import sys; before = set(sys.modules); import dilaff_jax; print(sorted({n.split('.')[0]"
        " for n in set(sys.modules) - before})); assert {'load', 'refine'} <= set(dir(dilaff_jax))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(found.stdout.replace("'", '"'))) <= sys.stdlib_module_names | {
        "dilaff_jax"
    }
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        dilaff_jax.lod  # noqa: B018


def test_five_lines_segment_an_image(tiny_run, tmp_path):
    file = data_files.save(IMAGE, tmp_path / "street.png")
    model = dilaff_jax.load(tiny_run)
    result = model(file)
    labels, plain, probs = runs.expected(tiny_run, IMAGE)
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_array_equal(result.plain, plain)
    np.testing.assert_allclose(result.probs, probs, atol=1e-4)
    assert result.labels.dtype == result.plain.dtype == np.uint8
    assert result.affinity.shape == (10, 12, 16)
    assert (result.affinity >= 0).all()
    assert (result.affinity <= 1).all()
    assert result.edges.shape == (10, 12, 2)
    assert result.classes.names == runs.NAMES
    assert result.overlay().shape == (40, 48, 3)
    np.testing.assert_array_equal(result.image, IMAGE)
    np.testing.assert_array_equal(model(IMAGE).labels, labels)


def test_edges_are_the_strongest_doubt_among_neighbours_inside(tiny_run):
    result = dilaff_jax.load(tiny_run)(IMAGE)
    inside = np.asarray(affinity.inside((10, 12), result.offsets))
    doubt = np.where(inside, 1 - result.affinity, 0)[..., 8:].max(axis=-1)
    np.testing.assert_allclose(result.edges[..., 1], 255 * doubt, atol=0.51)


def test_without_refinement_labels_are_the_plain_ones(tiny_run, tiny_plain_run):
    result = dilaff_jax.load(tiny_run)(IMAGE, refine=False)
    np.testing.assert_array_equal(result.labels, runs.expected(tiny_run, IMAGE)[1])
    bare = dilaff_jax.load(tiny_plain_run)(IMAGE)
    np.testing.assert_array_equal(bare.labels, runs.expected(tiny_plain_run, IMAGE)[0])
    np.testing.assert_array_equal(bare.labels, bare.plain)
    assert bare.affinity is bare.edges is bare.offsets is None


def test_the_refinement_can_be_another_than_the_runs(tiny_run):
    model = dilaff_jax.load(tiny_run, refine={"name": "identity"})
    result = model(IMAGE)
    np.testing.assert_array_equal(result.labels, result.plain)


@pytest.mark.parametrize(
    "bad",
    [IMAGE[..., 0], IMAGE.astype(np.float32) / 255, np.zeros((4, 4, 4), np.uint8)],
)
def test_an_array_that_is_no_rgb_image_is_refused_with_what_to_do(tiny_run, bad):
    with pytest.raises(ValueError, match=r"expected RGB uint8 \[H, W, 3\]"):
        dilaff_jax.load(tiny_run)(bad)


def test_what_cannot_be_loaded_says_why(tiny_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a run's workdir"):
        dilaff_jax.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is no run: .*config.json does not exist"):
        dilaff_jax.load(tmp_path)
    with pytest.raises(ValueError, match="pad is 10; expected 1 for exact sizes, or a multiple of"):
        dilaff_jax.load(tiny_run, pad=10)
    with pytest.raises(ValueError, match="resize is 0; expected a factor above 0"):
        dilaff_jax.load(tiny_run, resize=0)
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    (copy / "classes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"classes.json is damaged: 0 class names"):
        dilaff_jax.load(copy)
    (copy / "classes.json").unlink()  # then the data set is asked, and it is not there either
    with pytest.raises(ValueError, match="is not prepared in"):
        dilaff_jax.load(copy)


def test_classes_survive_the_file(tmp_path):
    class_list.Classes(runs.NAMES, runs.COLORS).write(tmp_path)
    found = class_list.read_classes(tmp_path)
    assert found.names == runs.NAMES
    np.testing.assert_array_equal(found.colors, runs.COLORS)


# Anybody's logits.


@pytest.fixture(scope="module")
def reference():
    labels, probs = propagate.refine_logits(LOGITS, EDGES, affinity.offsets((1, 2)), (20, 24))
    return np.asarray(labels), np.asarray(probs)


OPTIONS = {"dilations": (1, 2), "size": (20, 24)}


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, torch.from_numpy])
def test_arrays_come_back_as_the_kind_they_were(reference, make):
    logits = make(LOGITS)
    found = dilaff_jax.refine(logits, make(EDGES), **OPTIONS)
    assert isinstance(found.probs, type(logits) if not isinstance(logits, jax.Array) else jax.Array)
    assert isinstance(found.labels, type(found.probs))
    np.testing.assert_array_equal(np.asarray(found.labels), reference[0])
    np.testing.assert_allclose(np.asarray(found.probs), reference[1], atol=1e-6)


def test_torch_tensors_are_taken_channels_first_and_with_gradients(reference):
    logits = torch.from_numpy(LOGITS).permute(0, 3, 1, 2).requires_grad_()  # not contiguous
    edges = torch.from_numpy(EDGES).permute(0, 3, 1, 2)
    found = dilaff_jax.refine(logits, edges, channels_first=True, **OPTIONS)
    assert found.probs.shape == (2, 3, 20, 24)
    assert found.labels.shape == (2, 20, 24)
    np.testing.assert_allclose(found.probs.permute(0, 2, 3, 1), reference[1], atol=1e-6)
    found.probs[:] = 0  # theirs to change


def test_the_size_is_by_default_that_of_the_logits_and_options_reach_the_operator():
    found = dilaff_jax.refine(LOGITS, EDGES, dilations=(1, 2), operator="signed", steps=0)
    np.testing.assert_allclose(found.probs, jax.nn.softmax(LOGITS), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS, jnp.asarray(EDGES)), TypeError, "logits are of numpy, affinity_logits of jax"),
        (
            (LOGITS.tolist(), EDGES),
            TypeError,
            "logits is of type <class 'list'>; expected an array",
        ),
        (
            (LOGITS[0], EDGES),
            ValueError,
            r"logits has shape \(5, 6, 3\); expected \[B, \*spatial, C\]",
        ),
        ((LOGITS, EDGES[..., :7]), ValueError, "there are 32 offsets"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dilaff_jax.refine(*arguments)
