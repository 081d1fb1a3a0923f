"""Whole image, sliding window, scales and flips, with networks whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import affinity, resize, schema
from dilaff_jax.models import test_time

OFFSETS = affinity.offsets((1, 2))
IMAGES = np.random.default_rng(0).uniform(0, 255, (2, 37, 50, 3)).astype(np.float32)


def config(**changes):
    result = schema.defaults(test_time.KEYS)
    result.update(changes)
    return result


def pixelwise(images):
    """A network without context: logits at stride 1, affinities at stride 4, both of the pixels."""
    logits = images @ jnp.linspace(-0.02, 0.02, 12).reshape(3, 4)
    coarse = images[:, ::4, ::4]
    shifted = [affinity.shift(coarse, o, 128) for o in OFFSETS]
    edges = jnp.stack([jnp.sum(coarse * x, axis=-1) for x in shifted], axis=-1) / 1e4
    return {"logits": logits, "affinity_logits": edges}


def test_the_whole_image_is_the_network_itself():
    logits, edges = test_time.infer(pixelwise, IMAGES, OFFSETS, config())
    np.testing.assert_array_equal(logits, pixelwise(IMAGES)["logits"])
    np.testing.assert_array_equal(edges, pixelwise(IMAGES)["affinity_logits"])


@pytest.mark.parametrize("window", [(16, 16), (20, 36), (37, 24), (33, 50)])
@pytest.mark.parametrize("stride", [2 / 3, 1.0])
def test_windows_of_a_network_without_context_give_the_whole_image(window, stride):
    options = config(window=window, stride=stride)
    logits, edges = jax.jit(lambda x: test_time.infer(pixelwise, x, OFFSETS, options))(IMAGES)
    expected = pixelwise(IMAGES)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    # Pairs that reach out of a window are seen only by other windows; inner ones agree.
    assert edges.shape == expected["affinity_logits"].shape


def test_every_pixel_is_seen_by_a_window_and_averaged():
    """Each window answers with its own mean; the average is computed here by hand."""

    def mean(images):
        value = images.mean(axis=(1, 2, 3), keepdims=True)
        return {"logits": jnp.broadcast_to(value, (*images.shape[:3], 1)), "affinity_logits": None}

    found, edges = test_time.infer(mean, IMAGES, None, config(window=(20, 30), stride=0.5))
    total, count = np.zeros((2, 40, 60, 1)), np.zeros((1, 40, 60, 1))
    for top in (0, 10, 17):
        for left in (0, 15, 20):
            part = IMAGES[:, top : top + 20, left : left + 30]
            total[:, top : top + 20, left : left + 30] += part.mean((1, 2, 3), keepdims=True)
            count[:, top : top + 20, left : left + 30] += 1
    assert edges is None
    np.testing.assert_allclose(found, (total / np.maximum(count, 1))[:, :37, :50], rtol=1e-5)


def test_windows_begin_on_the_affinity_grid_and_cover_the_image():
    for size in range(1, 60):
        for window in (8, 13, 32):
            for cell in (1, 2, 4):
                starts = test_time.window_starts(size, min(window, size), 2 / 3, cell)
                assert all(s % cell == 0 for s in starts)
                assert starts[0] == 0
                assert starts[-1] + min(window, size) >= size
                gaps = np.diff(starts)
                assert (gaps <= min(window, size)).all() or cell > min(window, size)


def test_a_flip_of_a_network_without_context_changes_nothing():
    probs, edges = test_time.infer(pixelwise, IMAGES[:, :, :49], OFFSETS, config(flip=True))
    expected = pixelwise(IMAGES[:, :, :49])
    np.testing.assert_allclose(jax.nn.softmax(probs), jax.nn.softmax(expected["logits"]), atol=1e-5)
    np.testing.assert_allclose(edges, expected["affinity_logits"], atol=1e-4)


def test_scales_are_averaged_as_probabilities():
    scales = (0.5, 1.0, 1.5)
    logits, _ = test_time.infer(pixelwise, IMAGES, OFFSETS, config(scales=scales))
    expected = np.mean(
        [
            jax.nn.softmax(
                resize.bilinear(
                    pixelwise(resize.bilinear(IMAGES, (round(37 * s), round(50 * s))))["logits"],
                    (37, 50),
                )
            )
            for s in scales
        ],
        axis=0,
    )
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (0, 5)}, r"inference.window is \(0, 5\)"),
        ({"window": (5,)}, "expected .height, width., or three sides of volumes or None"),
        ({"stride": 0.0}, "inference.stride is 0.0"),
        ({"scales": (0.5, 2.0)}, "expected positive numbers, 1 among them"),
        ({"scales": (-1.0, 1.0)}, "expected positive"),
    ],
)
def test_bad_options_are_refused(changes, message):
    options = config()
    with options.ignore_type():
        options.update(changes)
    with pytest.raises(ValueError, match=message):
        test_time.infer(pixelwise, IMAGES, OFFSETS, options)
