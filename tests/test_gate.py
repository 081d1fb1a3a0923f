"""Pixels that propagation leaves as they are, and how they are chosen."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import affinity, gate, metrics, propagate
from dilaff_jax.ablation import ablate_config, class_losses, fit, foreign_outputs
from dilaff_jax.ablation.class_losses import CONFIDENCES, Changed, Sides
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.operators import Candidate
from dilaff_jax.errors import UserError
from dilaff_jax.export import stablehlo
from dilaff_jax.serving import network
from dilaff_jax.serving.foreign_files import Form

OFFSETS = affinity.offsets((1, 2), 2)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4, 0.4), (2, 9, 7)).astype(np.float32)
    return probs, rng.normal(0, 3, (2, 9, 7, len(OFFSETS))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options"), [("signed", {"strength": 0.5}), ("random_walk", {"steps": 2})]
)
def test_pixels_are_kept_by_class_and_confidence(name, options, arrays):
    probs, logits = arrays
    keep = (0.0, 0.6, 0.9, 1.0)
    whole = propagate.operator(name, **options)(probs, logits, OFFSETS)
    found = np.asarray(propagate.operator(name, keep=keep, **options)(probs, logits, OFFSETS))
    held = 0
    for at in np.ndindex(*probs.shape[:-1]):
        c = int(probs[at].argmax())
        stays = probs[at][c] > keep[c]
        np.testing.assert_array_equal(found[at], probs[at] if stays else whole[at])
        held += stays
    assert 0 < held < probs[..., 0].size
    assert (np.abs(whole - probs).max(axis=-1) > 1e-4).all()


def test_ones_hold_nothing_and_zeros_everything(arrays):
    probs, logits = arrays
    whole = propagate.operator("signed")(probs, logits, OFFSETS)
    none = propagate.operator("signed", keep=np.ones(4))(probs, logits, OFFSETS)
    every = propagate.operator("signed", keep=[0] * 4)(probs, logits, OFFSETS)
    np.testing.assert_array_equal(none, whole)
    np.testing.assert_array_equal(every, probs)


def test_what_is_kept_keeps_its_labels_at_full_size(arrays):
    """Logits on the affinity's grid, enlarged: what is not changed is as if nothing had been."""
    probs, logits = arrays
    scores, size = np.log(probs), (36, 28)
    refine = propagate.operator("signed", strength=1.0, keep=[0] * 4)
    labels, found = propagate.refine_logits(scores, logits, OFFSETS, size, refine)
    plain, before = propagate.refine_logits(
        scores, logits, OFFSETS, size, propagate.operator("identity")
    )
    np.testing.assert_array_equal(labels, plain)
    np.testing.assert_array_equal(found, before)


def test_of_a_coarse_grid_pixels_of_the_image_are_kept(arrays):
    """Not its cells: one that is left alone would still change with its neighbours in the image."""
    probs, logits = arrays
    scores, size, keep = np.log(probs), (36, 28), (0.0, 0.6, 0.9, 1.0)

    def refined(name, **options):
        refine = propagate.operator(name, **options)
        return [
            np.asarray(x) for x in propagate.refine_logits(scores, logits, OFFSETS, size, refine)
        ]

    plain, whole = refined("identity"), refined("signed", strength=1.0)
    labels, found = refined("signed", strength=1.0, keep=keep)
    held = 0
    for at in np.ndindex(*labels.shape):
        c = int(plain[1][at].argmax())
        stays = plain[1][at][c] > keep[c]
        expected = plain if stays else whole
        assert labels[at] == expected[0][at]
        np.testing.assert_allclose(found[at], expected[1][at], atol=1e-6)
        held += stays and plain[0][at] != whole[0][at]
    assert held > 100


def test_gradients_pass_what_is_changed_and_what_is_kept(arrays):
    probs, logits = arrays
    # Of one step: in the next a pixel's neighbours see what it became, kept or not.
    refine = propagate.operator("signed", steps=1, keep=(0.0, 0.6, 0.9, 1.0))
    held = np.asarray(gate.kept(probs, (0.0, 0.6, 0.9, 1.0)))
    by_probs, by_logits = jax.grad(
        lambda p, a: jnp.sum(refine(p, a, OFFSETS)[..., 0] ** 2), argnums=(0, 1)
    )(probs, logits)
    assert np.isfinite(by_probs).all()
    assert not np.asarray(by_logits)[held].any()
    assert np.asarray(by_logits)[~held].any()


@pytest.mark.parametrize("keep", [0.5, [0.5, 2.0], [-0.1, 1.0], [float("nan"), 1], "all", [[1.0]]])
def test_what_cannot_be_kept_is_refused(keep):
    with pytest.raises(UserError, match=r"refine.keep is .*\[0, 1\] for each class, or None"):
        propagate.operator("signed", keep=keep)


def test_another_number_of_classes_is_refused(arrays):
    with pytest.raises(UserError, match="keep has 3 numbers, and the probabilities are of 4"):
        propagate.operator("signed", keep=[1, 1, 1])(*arrays, OFFSETS)


# The choice, from counts. Pixels by themselves: `before`, `after`, `truth`, `sure`.


def _pixels(seed: int, classes: int = 3, number: int = 4000):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, number)
    before = np.where(rng.random(number) < 0.7, truth, rng.integers(0, classes, number))
    sure = rng.uniform(1 / classes, 1, number).astype(np.float32)
    # What propagation changes is right more often where the network is unsure, and of some classes.
    better = rng.uniform(0.2, 1, (classes, 1)) * np.array([[1.0, 0.6]])
    mended = rng.random(number) < better[before, (sure > 0.8).astype(int)]
    moved = rng.random(number) < 0.3
    after = np.where(moved, np.where(mended, truth, rng.integers(0, classes, number)), before)
    return before, after, truth, sure


def _sides(found, truth, classes):
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (truth, found), 1)
    return Sides(np.diag(confusion), confusion.sum(1), confusion.sum(0))


def _changed(before, after, truth, sure, classes):
    counts = np.zeros((3, classes, len(CONFIDENCES), classes), np.int64)
    for a, b, t, p in zip(before, after, truth, sure, strict=True):
        if a != b:
            level = next(i for i, limit in enumerate(CONFIDENCES) if p <= limit)
            for kind, counted in enumerate((True, t == a, t == b)):
                counts[kind, a, level, b] += counted
    return Changed(*counts)


def _held(pixels, keep):
    before, after, truth, sure = pixels
    return np.where(sure > np.asarray(keep)[before], before, after), truth


@pytest.mark.parametrize("seed", range(3))
def test_counts_say_what_every_gate_would_do(seed):
    pixels = _pixels(seed)
    plain = _sides(pixels[0], pixels[2], 3)
    right, predicted = _changed(*pixels, 3).effects()
    for levels in itertools.product((0, 2, 5, 8), repeat=3):
        found = Sides(
            plain.right + sum(right[a, j] for a, j in enumerate(levels)),
            plain.true,
            plain.predicted + sum(predicted[a, j] for a, j in enumerate(levels)),
        )
        expected = _sides(*_held(pixels, CONFIDENCES[list(levels)]), 3)
        np.testing.assert_array_equal(found.right, expected.right)
        np.testing.assert_array_equal(found.predicted, expected.predicted)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.0, 0.005, 1.0])
def test_the_gate_holds_the_least_of_all_by_which_no_class_loses_more(seed, limit):
    """Of all 729, pixel by pixel; class by class it may miss a little of the best."""
    pixels = _pixels(seed)
    plain = _sides(pixels[0], pixels[2], 3)
    keep = class_losses.best_gate(plain, _changed(*pixels, 3), limit)
    found, truth = _held(pixels, keep)
    assert (plain.ious - _sides(found, truth, 3).ious <= limit).all()
    least = len(truth)
    for each in itertools.product(CONFIDENCES, repeat=3):
        labels = _held(pixels, each)[0]
        if (plain.ious - _sides(labels, truth, 3).ious <= limit).all():
            least = min(least, (labels != pixels[1]).sum())
    held = (found != pixels[1]).sum()
    assert held == least


def test_not_even_one_pixel_of_ten_million_is_lost_for_less_to_hold():
    number = np.array([10_000_000, 10_000_000])
    counts = np.zeros((3, 2, len(CONFIDENCES), 2), np.int64)
    counts[:2, 1, 3, 0] = 1  # all that changes: one pixel, which was right
    keep = class_losses.best_gate(Sides(number, number, number), Changed(*counts), 0.0)
    assert keep[1] < CONFIDENCES[3]
    assert keep[0] == 1


def test_without_anything_to_lose_nothing_is_held():
    before = np.array([0, 0, 1, 1, 2, 2] * 50)
    after = truth = np.array([0, 1, 1, 2, 2, 0] * 50)
    sure = np.linspace(0.4, 1, len(truth)).astype(np.float32)
    keep = class_losses.best_gate(
        _sides(before, truth, 3), _changed(before, after, truth, sure, 3), 0.0
    )
    np.testing.assert_array_equal(keep, np.ones(3))


class _Drawn:
    """Six maps of two large classes, with lines of a third, one pixel wide; sizes differ."""

    num_classes, class_names = 3, ("ground", "field", "line")

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.maps = []
        for i in range(6):
            label = (np.add.outer(np.arange(32 - 4 * (i % 2)), np.arange(32)) > 30).astype(np.uint8)
            label[:, rng.integers(4, 28, 3)] = 2
            label[:2, :2] = 255
            self.maps.append(label)
        self.sizes = [label.shape for label in self.maps]

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"label": self.maps[index]}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return _outputs(tmp_path_factory.mktemp("outputs"), stride=1)


def _outputs(folder, stride):
    """Noisy logits; affinities that know the large classes, and take lines for what is around."""
    source, rng = _Drawn(), np.random.default_rng(1)
    labels = np.full((6, 32, 32), 255, np.uint8)
    for label, own in zip(source.maps, labels, strict=True):
        own[: label.shape[0]] = label
    labels = labels[:, ::stride, ::stride]
    scores = 2 * np.eye(3)[np.where(labels == 255, 0, labels)]
    scores = scores + rng.normal(0, 1.2, scores.shape)
    blind = np.where(labels == 2, np.roll(labels, 1, axis=2), labels)
    same, valid = affinity.targets(jnp.asarray(blind), OFFSETS)
    return Outputs(
        source=source,
        size=(32, 32),
        logits=scores.astype(np.float32),
        affinity_logits=np.where(np.asarray(valid), 4.0 * (2 * np.asarray(same) - 1), 0.0).astype(
            np.float16
        ),
        offsets=OFFSETS,
        about={},
        folder=folder,
        own=np.arange(6),
    )


def _by_hand(outputs, refine):
    """IoU of each class, image by image, without what pads them."""
    confusion = np.zeros((3, 3), np.int64)
    for i, label in enumerate(outputs.source.maps):
        found, _ = propagate.refine_logits(
            outputs.logits[i : i + 1], outputs.affinity_logits[i : i + 1], OFFSETS, (32, 32), refine
        )
        found = np.asarray(found[0])[: label.shape[0]]
        np.add.at(confusion, (label[label < 255], found[label < 255]), 1)
    return metrics.class_ious(confusion)


def test_what_an_operator_does_to_each_class_is_counted(outputs):
    candidate = Candidate("signed", (("steps", 3), ("strength", 0.3)))
    found = class_losses.compare(outputs, candidate, np.zeros(2), rows=4)
    refine = propagate.operator("signed", steps=3, strength=0.3)
    np.testing.assert_allclose(found.refined.ious, _by_hand(outputs, refine), atol=1e-6)
    plain = _by_hand(outputs, propagate.operator("identity"))
    np.testing.assert_allclose(found.plain.ious, plain, atol=1e-6)
    gains = found.refined.ious - found.plain.ious
    assert min(gains[:2]) > 0.1
    assert gains[2] < -0.1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("limit", [0.0, 0.02])
def test_behind_its_gate_no_class_loses_more(limit, stride, tmp_path):
    outputs = _outputs(tmp_path, stride)
    candidate = Candidate("signed", (("steps", 3), ("strength", 0.3)))
    found = class_losses.compare(outputs, candidate, np.zeros(2), rows=4)
    held, of = class_losses.gated(outputs, candidate, np.zeros(2), 4, limit, found)
    refine = propagate.operator("signed", **dict(held.options))
    # What the counts say is exact, also of a grid coarser than the image.
    levels = np.searchsorted(CONFIDENCES, np.float32(dict(held.options)["keep"]))
    right, predicted = (x[np.arange(3), levels].sum(0) for x in found.changed.effects())
    np.testing.assert_array_equal(of.right, found.plain.right + right)
    np.testing.assert_array_equal(of.predicted, found.plain.predicted + predicted)
    np.testing.assert_allclose(of.ious, _by_hand(outputs, refine), atol=1e-6)
    assert (found.plain.ious - of.ious <= limit).all()
    # The large classes still gain.
    assert (of.ious - found.plain.ious)[:2].min() > 0.02


def test_a_fit_keeps_classes_from_losing(outputs, tiny_run, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(foreign_outputs, "compute", lambda *_: (outputs, 1))
    config = network.read_config(workdir)
    config.ablate = ablate_config.default()
    with config.ignore_type():
        config.ablate.grid = ml_collections.ConfigDict(
            {"signed": {"steps": (3,), "strength": (0.3,)}}
        )
    inputs = foreign_outputs.Inputs(tmp_path, tmp_path, tmp_path)
    whole = fit.fit_files(config, workdir, inputs, Form())
    assert whole["refine"] == {"name": "signed", "steps": 3, "strength": 0.3}
    assert whole["classes"]["line"]["refined"] < whole["classes"]["line"]["plain"] - 0.1
    said = capsys.readouterr().out
    assert "line loses" in said
    assert "--max_class_loss 0.5 chooses so that no class loses more than 0.5" in said
    content = fit.fit_files(config, workdir, inputs, Form(), max_class_loss=0.5)
    assert content["max_class_loss"] == 0.5
    keep = content["refine"].pop("keep")
    assert content["refine"] == whole["refine"]
    assert min(keep) < 1
    for of in content["classes"].values():
        assert of["plain"] - of["kept"] <= 0.005
    mean = np.mean([of["kept"] for of in content["classes"].values()])
    assert content["after"]["miou"] == pytest.approx(mean, abs=1e-6)
    assert content["after"]["miou"] > content["before"]["miou"]
    assert "left alone" in capsys.readouterr().out
    assert json.loads((workdir / "refine.json").read_text())["refine"]["keep"] == list(keep)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"--max_class_loss is .* expected points of IoU"):
            fit.fit_files(config, workdir, inputs, Form(), max_class_loss=wrong)


def test_an_exported_file_keeps_the_same_pixels(tiny_run, tmp_path):
    net, _, _ = network.from_run(tiny_run)
    keep = [0.0, *[0.4] * (len(net.classes.names) - 1)]
    path = tmp_path / "model.zip"
    gated = dataclasses.replace(net, refine={"name": "signed", "strength": 2.0, "keep": keep})
    metadata = stablehlo.write(gated, path, size=(32, 48), platforms=("cpu",))
    assert metadata["refine"]["keep"] == keep
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    own = dilaff_jax.load(tiny_run, refine=gated.refine)(image)
    ungated = dilaff_jax.load(tiny_run, refine={"name": "signed", "strength": 2.0})(image)
    np.testing.assert_array_equal(dilaff_jax.load(path)(image).labels, own.labels)
    held = (own.labels == own.plain) & (ungated.labels != own.plain)
    assert held.any()


def test_a_class_that_is_absent_has_nothing_to_lose():
    truth = np.array([0, 0, 0, 1, 1, 1] * 50)
    before = np.array([0, 0, 1, 1, 1, 1] * 50)
    after = np.array([0, 2, 0, 1, 1, 1] * 50)
    sure = np.full(len(truth), 0.7, np.float32)
    plain = _sides(before, truth, 3)
    assert np.isnan(plain.ious[2])
    keep = class_losses.best_gate(plain, _changed(before, after, truth, sure, 3), 0.0)
    # The first class gains as much as it loses, the second gains, and the third has nothing.
    np.testing.assert_array_equal(keep, np.ones(3))
