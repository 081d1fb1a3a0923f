"""Colour-driven refinement against the authors' formula in torch, and mean field written out."""

import sys

import jax
import numpy as np
import pytest

from dilaff_jax import affinity, baselines, propagate

OFFSETS = affinity.offsets((1, 2))


def scene(seed=0, shape=(2, 11, 13), classes=4):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), shape).astype(np.float32)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    return probs, image


# PAMR.


def torch_pamr(probs, image, dilations, steps):
    """The authors' way: dilated convolutions with shift kernels on replicated borders."""
    torch = pytest.importorskip("torch")
    pad, conv2d = torch.nn.functional.pad, torch.nn.functional.conv2d
    eye = torch.eye(9).reshape(9, 1, 3, 3)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    shift, difference = eye[others], eye[[4]] - eye[others]

    def apply(x, kernel):
        b, c, h, w = x.shape
        flat = x.reshape(b * c, 1, h, w)
        maps = [conv2d(pad(flat, [d] * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
        return torch.cat(maps, dim=1).reshape(b, c, -1, h, w)

    x = torch.tensor(image.astype(np.float32)).permute(0, 3, 1, 2)
    mask = torch.tensor(probs).permute(0, 3, 1, 2)
    scale = 1e-8 + 0.1 * apply(x, eye).std(2, keepdim=True)
    weights = torch.softmax((-apply(x, difference).abs() / scale).mean(1, keepdim=True), 2)
    for _ in range(steps):
        mask = (apply(mask, shift) * weights).sum(2)
    return mask.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("shape", "dilations", "steps"),
    [((2, 11, 13), (1, 2), 3), ((1, 30, 31), baselines.PAMR_DILATIONS, 10), ((1, 1, 7), (1, 4), 2)],
)
def test_pamr_equals_the_authors_convolutions(shape, dilations, steps):
    probs, image = scene(shape=shape)
    found = baselines.pamr(probs, image, affinity.offsets(dilations), steps=steps)
    np.testing.assert_allclose(found, torch_pamr(probs, image, dilations, steps), atol=1e-5)


def test_pamr_defaults_to_the_authors_dilations():
    probs, image = scene()
    explicit = baselines.pamr(probs, image, affinity.offsets((1, 2, 4, 8, 12, 24)), steps=10)
    np.testing.assert_array_equal(baselines.pamr(probs, image), explicit)


def test_pamr_keeps_the_simplex_and_constants_and_does_nothing_in_no_steps():
    probs, image = scene()
    found = baselines.pamr(probs, image, OFFSETS)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    assert (found >= probs.min(axis=(1, 2), keepdims=True) - 1e-6).all()
    flat = np.full_like(probs, 0.25)
    np.testing.assert_allclose(baselines.pamr(flat, image, OFFSETS), flat, rtol=1e-5)
    np.testing.assert_array_equal(baselines.pamr(probs, image, OFFSETS, steps=0), probs)


def test_pamr_of_a_flat_image_is_the_mean_of_the_neighbours():
    probs, image = scene()
    found = baselines.pamr(probs, np.full_like(image, 90), affinity.offsets((1,)), steps=1)
    inner = sum(np.roll(probs, (-y, -x), (1, 2)) for y, x in affinity.offsets((1,))) / 8
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], inner[:, 1:-1, 1:-1], atol=1e-6)


def test_pamr_does_not_depend_on_the_scale_of_the_image():
    probs, image = scene()
    small = baselines.pamr(probs, image / 255, OFFSETS)
    np.testing.assert_allclose(small, baselines.pamr(probs, image, OFFSETS), atol=1e-4)


def test_pamr_smooths_within_a_colour_and_not_across():
    image = np.zeros((1, 12, 12, 3), np.uint8)
    image[:, :, 6:] = 200
    truth = (image[..., 0] > 0).astype(int)
    probs = np.eye(2, dtype=np.float32)[truth]
    probs[0, 5, 2] = probs[0, 8, 9] = [0.5, 0.5]
    probs[0, 3, 3] = [0.2, 0.8]
    found = baselines.pamr(probs, image, OFFSETS, steps=5)
    np.testing.assert_array_equal(found.argmax(axis=-1), truth)


def test_pamr_runs_under_jit_and_grad():
    probs, image = scene()
    offsets = affinity.offsets((1,))
    total, gradient = jax.jit(
        jax.value_and_grad(lambda p: baselines.pamr(p, image, offsets, steps=2).sum())
    )(probs)
    assert total == pytest.approx(probs.sum(), rel=0.1)
    # Every row of weights sums to one, so the gradient sums to the number of values.
    assert gradient.sum() == pytest.approx(probs.size, rel=1e-4)


def test_pamr_takes_volumes():
    probs, image = scene(shape=(1, 3, 4, 5))
    flat = np.full_like(probs, 0.25)
    found = baselines.pamr(flat, image, affinity.offsets((1,), ndim=3), steps=1)
    np.testing.assert_allclose(found, flat, rtol=1e-5)


def test_operators_share_one_signature():
    probs, image = scene()
    logits = np.zeros((*probs.shape[:-1], len(OFFSETS)), np.float32)
    for refine, guide in (
        (propagate.signed, logits),
        (baselines.pamr, image),
        (baselines.dense_crf, image),
    ):
        if refine is baselines.dense_crf:
            pytest.importorskip("pydensecrf")
        found = refine(probs, guide, OFFSETS, steps=1)
        assert found.shape == probs.shape
        assert found.dtype == np.float32


# DenseCRF.


def mean_field(probs, image, steps, spatial, bilateral):
    """Mean-field inference of one image over all pairs of pixels, without lattice."""
    height, width, classes = probs.shape
    place = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
    color = image.reshape(-1, 3).astype(float)

    def kernel(features):
        distance = ((features[:, None] - features[None]) ** 2).sum(-1)
        k = np.exp(-distance / 2)
        norm = 1 / np.sqrt(k.sum(1))
        return norm[:, None] * k * norm

    message = spatial[1] * kernel(place / spatial[0])
    both = np.concatenate([place / bilateral[0], color / bilateral[1]], 1)
    message = message + bilateral[2] * kernel(both)
    unary = np.log(np.clip(probs.reshape(-1, classes), 1e-5, 1))
    q = np.exp(unary) / np.exp(unary).sum(1, keepdims=True)
    for _ in range(steps):
        score = unary + message @ q
        q = np.exp(score - score.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
    return q.reshape(probs.shape)


def pictures(noise, seed=0, size=24):
    """An image of two colours with slight noise, and unsure probabilities of its two halves."""
    rng = np.random.default_rng(seed)
    truth = (np.add.outer(np.arange(size), np.arange(size)) > size).astype(int)
    image = np.array([[60, 90, 40], [180, 70, 120]])[truth] + rng.integers(-4, 5, (size, size, 3))
    logits = 1.5 * np.eye(2)[truth] + noise * rng.normal(size=(size, size, 2))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return probs[None].astype(np.float32), image[None].astype(np.uint8), truth


def test_dense_crf_approximates_mean_field_over_all_pairs():
    pytest.importorskip("pydensecrf")
    probs, image, _ = pictures(noise=1.0)
    found = baselines.dense_crf(
        probs, image, steps=3, bilateral_sigma=20, spatial_weight=1, bilateral_weight=1
    )
    expected = mean_field(probs[0], image[0], 3, (3.0, 1.0), (20.0, 13.0, 1.0))
    change = np.abs(expected - probs[0]).mean()
    assert change > 0.1
    assert np.abs(found[0] - expected).mean() < 0.1 * change


def test_dense_crf_finds_the_two_colours_again():
    pytest.importorskip("pydensecrf")
    probs, image, truth = pictures(noise=1.5)
    before = (probs[0].argmax(-1) == truth).mean()
    found = baselines.dense_crf(probs, image)
    assert before < 0.85
    assert (found[0].argmax(-1) == truth).mean() > 0.99
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_dense_crf_without_steps_or_weights_is_the_identity():
    pytest.importorskip("pydensecrf")
    probs, image = scene()
    for options in ({"steps": 0}, {"spatial_weight": 0, "bilateral_weight": 0}):
        np.testing.assert_allclose(baselines.dense_crf(probs, image, **options), probs, atol=1e-4)


def test_dense_crf_treats_each_image_alone_and_takes_one_class():
    pytest.importorskip("pydensecrf")
    probs, image = scene()
    batch = baselines.dense_crf(probs, image)
    np.testing.assert_array_equal(batch[1:], baselines.dense_crf(probs[1:], image[1:]))
    sure = np.ones((1, 5, 6, 1), np.float32)
    np.testing.assert_array_equal(baselines.dense_crf(sure, image[:1, :5, :6]), sure)


def test_dense_crf_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install 'dilaff-jax\[crf\]'"):
        baselines.dense_crf(*scene())


def test_dense_crf_under_jit_says_that_it_cannot():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(baselines.dense_crf)(*scene())


@pytest.mark.parametrize("refine", [baselines.pamr, baselines.dense_crf])
def test_bad_input_is_refused(refine):
    probs, image = scene()
    with pytest.raises(
        ValueError, match=r"image has shape \(2, 11, 12, 3\); expected \(2, 11, 13, 3\)"
    ):
        refine(probs, image[:, :, 1:], OFFSETS)
    with pytest.raises(ValueError, match=r"image has shape \(2, 11, 13, 1\)"):
        refine(probs, image[..., :1], OFFSETS)
    with pytest.raises(ValueError, match=r"probs has shape \(11, 13, 4\); expected 4 axes"):
        refine(probs[0], image[0], OFFSETS)
    with pytest.raises(ValueError, match="steps is -1"):
        refine(probs, image, OFFSETS, steps=-1)
    with pytest.raises(ValueError, match="probs holds NaN"):
        refine(np.full_like(probs, np.nan), image, OFFSETS)
    with pytest.raises(ValueError, match="image holds NaN"):
        refine(probs, np.full(image.shape, np.inf), OFFSETS)


def test_a_bad_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        baselines.pamr(*scene(), OFFSETS, temperature=0)
