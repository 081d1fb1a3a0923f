"""Decoders: shapes at odd sizes, pooling, dropout, options, gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax.models import decoders, dispatch, layers, segmenter
from tests.test_encoders import noise, random_variables

DROPPING = ("fcn", "pspnet", "unet", "deeplabv3", "deeplabv3plus", "segformer", "upernet")
NAMES = (*DROPPING, "linear")
# Small enough to compile in seconds.
NARROW = {
    "fcn": {},
    "pspnet": {"width": 16},
    "unet": {"widths": (16, 8)},
    "deeplabv3": {"width": 16, "rates": (1, 2)},
    "deeplabv3plus": {"width": 16, "rates": (1, 2), "low_level": 8},
    "segformer": {"width": 16},
    "upernet": {"width": 16, "bins": (1, 2)},
    "linear": {"levels": 2},
}


def features(height=33, width=47, output_stride=16, dtype=None, batch=2):
    """What an encoder with few channels would give."""
    channels = (4, 8, 8, 16, 32)
    strides = [min(2**i, output_stride) for i in range(1, 6)]
    maps = [
        noise(batch, -(-height // s), -(-width // s), c, seed=s)
        for s, c in zip(strides, channels, strict=True)
    ]
    return tuple(jnp.asarray(x, dtype) for x in maps)


def build(name, **options):
    make = segmenter.lookup(decoders, name, "decoder")
    return make(num_classes=5, **(NARROW[name] | options))


def apply(decoder, variables, x, train=False, seed=0):
    return decoder.apply(
        variables, x, train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(seed)}
    )[0]


def test_every_decoder_is_tested_here():
    with pytest.raises(ValueError, match=", ".join(sorted(NAMES))):
        segmenter.lookup(decoders, "no_such_decoder", "decoder")


@pytest.mark.parametrize("size", [(33, 47), (64, 96), (17, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_scores_have_the_stride_of_the_decoder(name, size):
    x = features(*size)
    decoder = build(name)
    (scores, decoded), _ = jax.eval_shape(
        lambda: decoder.init_with_output(jax.random.key(0), x, False)
    )
    # The U-Net of two widths ends at the features two before the last.
    levels = {"unet": 2, "deeplabv3plus": 1, "segformer": 0, "upernet": 0, "linear": 3}
    expected = x[levels.get(name, 4)].shape[:3]
    assert scores.shape == (*expected, 5)
    assert decoded.shape[:3] == expected


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name):
    x = features()
    decoder = build(name)
    variables = random_variables(decoder, x)

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: jnp.sum(jnp.sin(apply(decoder, {**variables, "params": p}, x, True)[0]))
        )(params)

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(value).all(), path
        assert np.any(value != 0), path


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_bfloat16_within_the_decoder(name):
    decoder = build(name, style=layers.Style(dtype=jnp.bfloat16))
    x = features(dtype=jnp.bfloat16)
    variables = random_variables(build(name), features())
    scores, decoded = apply(decoder, variables, x)
    assert scores.dtype == decoded.dtype == jnp.bfloat16
    expected, _ = apply(build(name), variables, features())
    error = np.abs(scores.astype(np.float32) - expected).mean()
    assert 0 < error < 0.03 * np.abs(expected).mean()


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_random_in_training_only(name):
    x = features()
    decoder = build(name, dropout=0.5)
    variables = random_variables(decoder, x)
    first, second = (apply(decoder, variables, x, True, seed)[0] for seed in (0, 1))
    assert not np.allclose(first, second)
    first, second = (apply(decoder, variables, x, False, seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_norm_trains_as_it_evaluates_but_for_dropout(name):
    x = features()
    variables = random_variables(build(name), x)
    still = {"dropout": 0.0} if name in DROPPING else {}
    frozen = build(name, style=layers.Style(frozen_norm=True), **still)
    expected, _ = apply(build(name), variables, x, False)
    np.testing.assert_array_equal(apply(frozen, variables, x, True)[0], expected)
    assert not np.allclose(apply(build(name, **still), variables, x, True)[0], expected)


@pytest.mark.parametrize("size", [(7, 11), (1, 1), (3, 2), (33, 65)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_adaptive_pooling_equals_torch_at_odd_sizes(size, bins):
    torch = pytest.importorskip("torch")
    x = noise(2, *size, 3)
    expected = torch.nn.functional.adaptive_avg_pool2d(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), bins
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(layers.adaptive_average_pool(x, bins), expected, atol=1e-6)


def conv_dilations(decoder, x):
    """The dilations of all 3×3 convolutions in the program of a decoder."""
    variables = jax.eval_shape(lambda: decoder.init(jax.random.key(0), x, False))
    # On an accelerator each is one convolution.
    with dispatch.made_for("tpu"):
        traced = jax.jit(lambda v: decoder.apply(v, x, False)).trace(variables)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = [line for line in program.splitlines() if "stablehlo.convolution" in line]
    rates = [re.search(r"rhs_dilate = \[(\d+)", line) for line in found if ", tensor<3x3x" in line]
    return sorted(int(rate[1]) if rate else 1 for rate in rates)


@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18])])
def test_aspp_rates_follow_the_output_stride(name, stride, rates):
    make = segmenter.lookup(decoders, name, "decoder")
    decoder = make(num_classes=3, output_stride=stride)
    others = [1] if name == "deeplabv3" else [1, 1]
    assert conv_dilations(decoder, features(output_stride=stride)) == others + rates


def test_aspp_rates_can_be_chosen():
    assert conv_dilations(build("deeplabv3", rates=(5, 7)), features()) == [1, 5, 7]
    assert conv_dilations(build("deeplabv3", rates=(), head=False), features()) == []


def test_separable_convolutions_save_parameters():
    def parameters(**options):
        decoder = build("deeplabv3plus", width=64, **options)
        variables = jax.eval_shape(lambda: decoder.init(jax.random.key(0), features(), False))
        return sum(v.size for v in jax.tree.leaves(variables["params"]))

    assert parameters(separable=True) < 0.4 * parameters(separable=False)


def test_unet_refuses_more_widths_than_there_are_finer_features():
    with pytest.raises(ValueError, match="5 feature maps, so give 1 to 4 widths"):
        build("unet", widths=(8,) * 5).init(jax.random.key(0), features(), False)
    with pytest.raises(ValueError, match="one feature map, and the decoder 'unet' joins two"):
        build("unet", widths=(8,)).init(jax.random.key(0), features()[:1], False)


def test_segformers_head_computes_before_it_enlarges_what_its_source_computes_after():
    """Enlarged first, then joined, then convolved, as published."""
    x = features()
    decoder = build("segformer")
    variables = random_variables(decoder, x)
    params = variables["params"]
    size = x[0].shape[1:3]
    brought = [
        layers.resize_to(y @ params[f"linear_{i}"]["kernel"] + params[f"linear_{i}"]["bias"], size)
        for i, y in enumerate(x)
    ]
    y = jnp.concatenate(brought[::-1], axis=-1) @ params["fuse"]["conv"]["kernel"][0, 0]
    stats, norm = variables["batch_stats"]["fuse"]["norm"], params["fuse"]["norm"]
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(
        apply(decoder, variables, x)[1], np.maximum(y, 0), atol=1e-5 * np.abs(y).max()
    )


def test_upernet_makes_a_pyramid_of_maps_of_one_size():
    x = tuple(jnp.asarray(noise(2, 6, 9, 8, seed=i)) for i in range(4))
    decoder = build("upernet", scales=(4, 2, 1, 0.5))
    variables = decoder.init(jax.random.key(0), x, False)
    scores, _ = apply(decoder, variables, x)
    assert scores.shape == (2, 24, 36, 5)
    with pytest.raises(ValueError, match=r"scales are \(4, 2\); expected 4 numbers"):
        build("upernet", scales=(4, 2)).init(jax.random.key(0), x, False)


def test_the_linear_head_reads_as_many_maps_as_there_are():
    with pytest.raises(ValueError, match="levels is 6; the encoder has 5 maps"):
        build("linear", levels=6).init(jax.random.key(0), features(), False)


def test_deeplabv3plus_joins_the_features_at_stride_4():
    x = features()
    decoder = build("deeplabv3plus")
    variables = random_variables(decoder, x)
    expected, _ = apply(decoder, variables, x)
    for level in range(5):
        other = [f + (i == level) for i, f in enumerate(x)]
        changed = not np.allclose(apply(decoder, variables, other)[0], expected)
        assert changed == (level in (1, 4)), level


def test_dropout_does_not_depend_on_how_the_batch_is_spread_over_devices():
    if jax.local_device_count() < 4:
        pytest.skip("needs 4 devices")
    x = noise(8, 3, 5, 16)

    def drop(x, axis_name):
        layer = layers.Dropout(0.5, layers.Style(axis_name=axis_name))
        return layer.apply({}, x, True, rngs={"dropout": jax.random.key(3)})

    whole = drop(x, None)
    spread = jax.pmap(lambda x: drop(x, "batch"), axis_name="batch", devices=jax.devices()[:4])
    np.testing.assert_array_equal(spread(x.reshape(4, 2, 3, 5, 16)).reshape(x.shape), whole)
    assert np.unique(np.where(whole == 0, 0, whole / x).round(5)).tolist() == [0, 2]
    assert 0.4 < np.mean(whole == 0) < 0.6
    assert not np.array_equal(whole[0] == 0, whole[1] == 0)


def test_deep_supervision_scores_every_step_before_the_last_and_changes_nothing_else():
    x = features(64, 96)
    plain, deep = (build("unet", widths=(16, 12, 8), deep_supervision=d) for d in (False, True))
    variables = random_variables(deep, x)
    scores, decoded, coarser = deep.apply(variables, x, False)
    # Widths end at the features of stride 4; the steps before them are of strides 8 and 16.
    assert [c.shape for c in coarser] == [(*x[i].shape[:3], 5) for i in (2, 3)]
    own = {k: v for k, v in variables["params"].items() if k not in ("logits0", "logits1")}
    expected = plain.apply(variables | {"params": own}, x, False)
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(decoded, expected[1])
    with pytest.raises(ValueError, match="deep_supervision scores the steps before the last"):
        build("unet", widths=(8,), deep_supervision=True).init(jax.random.key(0), x, False)
