"""Bilinear resizing against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dilaff_jax import resize

SIZES = [
    ((5, 7), (5, 7)),
    ((5, 7), (20, 28)),
    ((9, 6), (13, 31)),
    ((33, 33), (8, 20)),
    ((1, 1), (4, 3)),
    ((4, 3), (1, 1)),
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bilinear_equals_torch_interpolate(source, target, align_corners):
    x = np.random.default_rng(0).standard_normal((2, *source, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        target,
        mode="bilinear",
        align_corners=align_corners,
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(
        resize.bilinear(x, target, align_corners=align_corners), expected, atol=1e-5
    )


@pytest.mark.parametrize(("image", "grid"), [((513, 513), (129, 129)), ((100, 75), (25, 19))])
def test_from_aligned_corners_is_enlarged_then_shrunk_in_torch(image, grid):
    """And enlarged again it is what aligned corners give, but for detail finer than its grid."""
    interpolate = torch.nn.functional.interpolate
    x = np.random.default_rng(0).normal(size=(2, -(-image[0] // 16), -(-image[1] // 16), 3))
    given = torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
    full = interpolate(given, image, mode="bilinear", align_corners=True)
    expected = interpolate(full, grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    found = resize.from_aligned_corners(jnp.asarray(x), image, grid)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again, full = resize.bilinear(found, image), full.permute(0, 2, 3, 1).numpy()
    assert np.abs(again - full).mean() < 0.08 * np.abs(full).mean()


@pytest.mark.parametrize("size", [(9, 13), (5, 7), (3, 4)])
def test_excluded_classes_with_aligned_corners_are_bilinear_elsewhere(size):
    x = np.random.default_rng(0).normal(size=(1, 5, 7, 3)).astype(np.float32)
    found = resize.bilinear_logits(jnp.asarray(x), size, align_corners=True)
    np.testing.assert_allclose(
        found, resize.bilinear(jnp.asarray(x), size, align_corners=True), atol=1e-6
    )
    x[..., 2] = -np.inf
    off = resize.bilinear_logits(jnp.asarray(x), size, align_corners=True)
    np.testing.assert_allclose(off[..., :2], found[..., :2], atol=1e-6)
    assert np.isneginf(off[..., 2]).all()


def test_bfloat16_is_resized_in_float32():
    x = np.random.default_rng(0).standard_normal((1, 3, 3, 1)).astype("bfloat16")
    assert resize.bilinear(x, (7, 7)).dtype == np.float32


@pytest.mark.parametrize(("n_in", "n_out"), [(65, 513), (1, 7), (5, 5), (9, 4), (2, 31)])
def test_the_matrix_is_what_bilinear_does_along_one_axis(n_in, n_out):
    # bilinear places its taps in float32, which at some sizes is off by 3e-5.
    expected = resize.bilinear(np.eye(n_in, dtype=np.float32), (n_out,))
    found = resize.matrix(n_in, n_out)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
