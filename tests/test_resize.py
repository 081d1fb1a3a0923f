"""Bilinear resizing against torch."""

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
