"""A network of affinities alone, and the refinement of what other networks say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import dilaff_jax
from dilaff_jax import propagate, resize, train
from dilaff_jax.ablation import ablate_config
from dilaff_jax.data import datasets
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter
from dilaff_jax.preflight.run import run as preflight
from tests import data_files, tiny_run
from tests.running import (
    assert_bit_identical,
    assert_same_numbers,
    killed_after,
    lines,
    make_config,
    saved,
)

NUMBER = len(tiny_run.NAMES)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=7)


def alone(data_dir):
    config = make_config(data_dir)
    with config.model.ignore_type():
        config.model.segmentation = None
    config.best_metric = "affinity/mean/average_precision"
    return config


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    return workdir, train.train_and_evaluate(alone(data_dir), workdir)


def test_a_run_without_a_segmentation_has_edges_and_nothing_else(unbroken):
    workdir, results = unbroken
    assert not [k for k in saved(workdir, 6) if "decoder']['logits" in k]
    first, *_, last = lines(workdir)
    assert {"train/loss", "train/affinity_loss"} <= first.keys()
    assert not [k for k in first if "miou" in k or "segmentation" in k]
    assert {k.split("/")[1] for k in last if k.startswith("eval/")} == {"affinity", "images"}
    for dilation in (1, 2):
        for figure in ("precision", "recall", "average_precision", "calibration_error"):
            assert 0 <= results.scalars[f"affinity/d{dilation}/{figure}"] <= 1
    assert "dilation 2" in results.table
    assert "calibration error" in results.table
    # Image, truth and edges, side by side.
    [shown] = results.pictures.values()
    assert shown.shape[1] == 3 * 32
    assert not (workdir / "evaluation" / "6" / "predictions").exists()


def test_a_resumed_run_and_one_on_four_devices_are_the_same(
    unbroken, data_dir, tmp_path, monkeypatch
):
    with killed_after(monkeypatch, 3):
        train.train_and_evaluate(alone(data_dir), tmp_path / "killed")
    train.train_and_evaluate(alone(data_dir), tmp_path / "killed")
    assert_bit_identical(unbroken[0], tmp_path / "killed")
    config = alone(data_dir)
    config.parallel.update({"mode": "shard_map", "devices": 1})
    train.train_and_evaluate(config, tmp_path / "one")
    assert_same_numbers(lines(tmp_path / "one"), lines(unbroken[0]))


def test_classes_are_of_no_matter_to_it(data_dir):
    """The same network, whatever the number of classes of its labels."""
    config = alone(data_dir)
    few, many = (segmenter.abstract_variables(segmenter.build(config.model, n)) for n in (2, 200))
    assert jax.tree.map(lambda x: x.shape, few) == jax.tree.map(lambda x: x.shape, many)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best_metric": "miou"}, "model.segmentation is None; an affinity network by itself has"),
        ({"model.affinity": None}, "then model.affinity must have a head"),
        ({"model.aux": True}, "and model.aux, which scores classes, must be False"),
        ({"loss.aaf": 1.0}, "loss.aaf and loss.refined are losses of a segmentation"),
        ({"model.affinity.sources": ("probabilities",)}, "the model has no segmentation; leave"),
    ],
)
def test_what_needs_a_segmentation_is_refused_at_once(change, message, data_dir, tmp_path):
    config = alone(data_dir)
    for key, value in change.items():
        *parents, name = key.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        with section.ignore_type():
            section[name] = value
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    config = alone(data_dir)
    config.ablate = ablate_config.default()
    with pytest.raises(UserError, match="an ablation compares segmentations"):
        ablate_config.check(config)


def test_a_metric_of_edges_needs_edges(data_dir, tmp_path):
    config = make_config(data_dir)
    config.loss.affinity = 0.0
    config.best_metric = "affinity/mean/f1"
    with pytest.raises(UserError, match="the model has no affinity head; use 'miou'"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_preflight_and_test_time_views_work_without_a_segmentation(data_dir, tmp_path):
    config = alone(data_dir)
    config.inference.update({"flip": True, "window": (32, 32)})
    report = preflight(config, tmp_path, "auto", search=False)
    assert report["programs"]["propagation"]["fits"]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def random_logits(*shape, seed=1):
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def by_hand(model, image, logits, size):
    """What `refine_logits` makes of another network's logits and this one's affinities."""
    net = model.network
    _, affinity_logits = jax.jit(net.apply)(net.variables, image[None])
    labels, probs = propagate.refine_logits(
        logits[None], affinity_logits, net.offsets, size, propagate.operator(**net.refine)
    )
    return np.asarray(labels[0]), np.asarray(probs[0])


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_logits_of_any_stride_are_refined_as_the_method_says(stride, tiny_run):
    model, image = dilaff_jax.load(tiny_run), picture(37, 50)
    logits = random_logits(-(-37 // stride), -(-50 // stride), NUMBER)
    result = model.refine(image, logits)
    labels, probs = by_hand(model, image, logits, (37, 50))
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_allclose(result.probs, probs, atol=1e-6)
    plain = np.argmax(resize.bilinear(jnp.asarray(logits), (37, 50)), -1)
    np.testing.assert_array_equal(result.plain, plain)
    assert (result.labels != result.plain).any()


def test_its_own_logits_are_refined_as_in_the_network(tiny_run):
    model, image = dilaff_jax.load(tiny_run), picture(37, 50)
    own, refined = model(image), model.refine(image, np.asarray(model.infer(image).logits))
    np.testing.assert_array_equal(refined.labels, own.labels)
    np.testing.assert_array_equal(refined.plain, own.plain)
    np.testing.assert_allclose(refined.probs, own.probs, atol=1e-6)


def test_numpy_jax_and_torch_and_both_layouts_give_the_same(tiny_run):
    torch = pytest.importorskip("torch")
    model, image, logits = dilaff_jax.load(tiny_run), picture(37, 50), random_logits(9, 12, NUMBER)
    wanted = model.refine(image, logits).probs
    for given in (jnp.asarray(logits), torch.tensor(logits), logits[None]):
        np.testing.assert_array_equal(model.refine(image, given).probs, wanted)
    for given in (np.moveaxis(logits, -1, 0), torch.tensor(logits).permute(2, 0, 1)[None]):
        found = model.refine(image, given, channels_first=True)
        np.testing.assert_array_equal(found.probs, wanted)
    half = model.refine(image, logits.astype(np.float16)).probs
    np.testing.assert_allclose(half, wanted, atol=1e-2)


def test_aligned_corners_are_those_of_torch(tiny_run):
    torch = pytest.importorskip("torch")
    model, image, logits = dilaff_jax.load(tiny_run), picture(37, 50), random_logits(5, 7, NUMBER)
    full = torch.nn.functional.interpolate(
        torch.tensor(logits).permute(2, 0, 1)[None], (37, 50), mode="bilinear", align_corners=True
    )
    wanted = model.refine(image, full, channels_first=True)
    found = model.refine(image, logits, align_corners=True)
    np.testing.assert_array_equal(found.plain, full[0].argmax(0))
    np.testing.assert_allclose(found.probs, wanted.probs, atol=1e-4)


def test_a_class_that_is_switched_off_stays_off(tiny_run):
    model, image, logits = dilaff_jax.load(tiny_run), picture(37, 50), random_logits(5, 7, NUMBER)
    logits[..., 1] = -np.inf
    for align_corners in (False, True):
        result = model.refine(image, logits, align_corners=align_corners)
        assert not (result.labels == 1).any()
        assert (result.probs[..., 1] == 0).all()
        assert np.isfinite(result.probs).all()


@pytest.mark.parametrize(("pad", "factor"), [(64, None), (1, 0.5), (64, 0.5)])
def test_padding_and_scaling_touch_the_affinities_alone(pad, factor, tiny_run):
    """What another network says is enlarged by itself; far from borders padding is not felt."""
    image, logits = picture(64, 96), random_logits(64, 96, NUMBER)
    result = dilaff_jax.load(tiny_run, pad=pad, resize=factor).refine(image, logits)
    np.testing.assert_array_equal(result.plain, np.argmax(logits, -1))
    assert result.labels.shape == (64, 96)
    off = dilaff_jax.load(tiny_run, pad=pad, resize=factor, refine={"name": "identity"})
    np.testing.assert_allclose(
        off.refine(image, logits).probs, scipy.special.softmax(logits, -1), atol=1e-5
    )


def test_an_affinity_network_refines_any_classes_and_segments_nothing(unbroken, data_dir):
    model = dilaff_jax.load(unbroken[0])
    image = datasets.load(make_config(data_dir).data, "validation")[0]["image"]
    logits = random_logits(8, 8, 30)
    result = model.refine(image, logits)
    labels, _ = by_hand(model, image, logits, image.shape[:2])
    np.testing.assert_array_equal(result.labels, labels)
    assert result.classes.names[29] == "29"
    assert len({tuple(c) for c in result.classes.colors}) == 30
    assert result.overlay().shape == image.shape
    assert model.refine(image, random_logits(8, 8, 8)).classes is model.classes
    with pytest.raises(UserError, match="is an affinity network by itself, without a segmentation"):
        model(image)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            np.zeros((4, 4)),
            r"shape \(4, 4\) and dtype float\d\d; expected floating point \[h, w, C\]",
        ),
        (np.zeros((4, 4, 3), np.int32), "dtype int32; expected floating point"),
        (np.zeros((2, 4, 4, 3), np.float32), r"shape \(2, 4, 4, 3\).* of one image"),
        (np.zeros((4, 4, 5), np.float32), "have 5 classes, .* and this model has 3; give those"),
        (np.zeros((3, 4, 5), np.float32), r"or channels_first=True for \[C, h, w\]"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, message, tiny_run):
    with pytest.raises(UserError, match=message):
        dilaff_jax.load(tiny_run).refine(picture(37, 50), logits)


def test_a_network_without_affinities_cannot_refine(tiny_plain_run):
    with pytest.raises(UserError, match="has no affinity head, so it cannot refine"):
        dilaff_jax.load(tiny_plain_run).refine(picture(37, 50), random_logits(4, 4, NUMBER))
