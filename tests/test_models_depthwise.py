"""Depthwise convolution: the same numbers and gradients as XLA's grouped one, in either form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax.models import depthwise
from tests.test_encoders import noise


def grouped(x, kernel, strides, padding, rates):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=rates,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize("size", [(9, 12), (8, 1)])
@pytest.mark.parametrize("padding", ["SAME", "torch", ((2, 1), (0, 3))])
@pytest.mark.parametrize(
    ("kernel", "stride", "rate"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2), (3, 2, 3), (1, 2, 1)]
)
def test_values_and_gradients_are_the_grouped_convolutions(size, padding, kernel, stride, rate):
    if padding == "torch":
        reach = rate * (kernel - 1) // 2
        padding = ((reach, reach), (reach, reach))
    x, w = noise(2, *size, 4), noise(kernel, kernel, 1, 4, seed=1)
    strides, rates = (stride, stride), (rate, rate)
    if not isinstance(padding, str) and any(
        n + sum(p) < rate * (kernel - 1) + 1 for n, p in zip(size, padding, strict=True)
    ):
        pytest.skip("the filter does not fit into the padded image")

    def both(function):
        def loss(x, w):
            y = function(x, w)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
        return y, *gradients

    ours = both(lambda x, w: depthwise.conv(x, w, strides, padding, rhs_dilation=rates))
    theirs = both(lambda x, w: grouped(x, w, strides, padding, rates))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_in_gives_bfloat16_out_summed_in_float32():
    x, w = (jnp.asarray(v, jnp.bfloat16) for v in (noise(2, 9, 9, 4), noise(5, 5, 1, 4, seed=1)))

    def loss(x, w):
        return jnp.sum(depthwise.conv(x, w, (1, 1), "SAME", rhs_dilation=(1, 1)) ** 2)

    y = depthwise.conv(x, w, (1, 1), "SAME", rhs_dilation=(1, 1))
    wide = grouped(x.astype(jnp.float32), w.astype(jnp.float32), (1, 1), "SAME", (1, 1))
    assert {v.dtype for v in (y, *jax.grad(loss, argnums=(0, 1))(x, w))} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("platform", "calls_conv"), [("cpu", False), ("cuda", True), ("tpu", True)]
)
def test_each_platform_gets_the_form_that_it_is_fast_at(platform, calls_conv):
    def loss(x, w):
        return jnp.sum(depthwise.conv(x, w, (2, 2), "SAME", rhs_dilation=(1, 1)) ** 2)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(noise(1, 8, 8, 4), noise(3, 3, 1, 4))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in program) == calls_conv
