"""Encoders: shapes, dilation, normalisation, precision, gradients."""

import functools
import pkgutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax.models import encoders, layers, segmenter
from tests import test_transformers

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenet_v2",
    "mobilenet_v2_tf",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "unet",
)
# One of each kind; the others differ by a table only, and the parity report runs them all.
DILATING = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0", "unet")
# Those of one output stride alone, see also tests/test_transformers.py.
TRANSFORMERS = ("mit_b0", "convnext_tiny", "dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16")
KINDS = (*DILATING, *TRANSFORMERS)
# The same with as few blocks as have every kind of layer, for what compiles slowly.
SHORT = {
    "resnet18": {"depths": (1, 2), "stages": 2},
    "resnet50": {"depths": (1, 2), "stages": 2},
    "mobilenet_v2": {"table": ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 1, 2, 3))},
    "efficientnet_lite0": {"table": ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 1, 2, 5))},
    "unet": {"widths": (4, 6, 8)},
    "mit_b0": {"widths": (8, 16), "depths": (2, 1), "heads": (1, 2), "reductions": (2, 1)},
    "convnext_tiny": {"widths": (8, 16), "depths": (2, 1)},
    **{
        name: {"width": 16, "depth": 3, "heads": 2, "hidden": 24, "blocks": (1, 2)}
        for name in ("dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16")
    },
}
CHANNELS = {
    "resnet18": (64, 64, 128, 256, 512),
    "resnet34": (64, 64, 128, 256, 512),
    "resnet50": (64, 256, 512, 1024, 2048),
    "resnet101": (64, 256, 512, 1024, 2048),
    "mobilenet_v2": (16, 24, 32, 96, 320),
    "mobilenet_v2_tf": (16, 24, 32, 96, 320),
    "efficientnet_lite0": (16, 24, 40, 112, 320),
    "efficientnet_lite1": (16, 24, 40, 112, 320),
    "efficientnet_lite2": (16, 24, 48, 120, 352),
    "unet": (64, 128, 256, 512, 1024),
}


def nominal_strides(encoder):
    return getattr(encoder, "strides", (2, 4, 8, 16, 32))


def build(name, style=layers.Style(), **options):  # noqa: B008 - frozen
    """At the stride that the encoder has, where it has one alone."""
    stride = 32 if name in DILATING or not name.startswith("dinov") else 16
    return segmenter.build_encoder(name, style, output_stride=stride, **options)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, x):
    """Variables with random scales, biases and statistics, so that no norm is an identity."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
    rng = np.random.default_rng(0)

    def value(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(np.float32)
        low, high = {"scale": (0.5, 1.0), "var": (0.5, 1.5)}.get(name, (-0.2, 0.2))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


def test_every_encoder_is_tested_here():
    found = set()
    for info in pkgutil.iter_modules(encoders.__path__):
        package = __import__(f"{encoders.__name__}.{info.name}", fromlist=["VARIANTS"])
        found |= set(package.VARIANTS)
    assert found == {*NAMES, *test_transformers.PARAMETERS}


@pytest.mark.parametrize(("output_stride", "size"), [(8, (65, 97)), (16, (50, 1)), (32, (65, 97))])
@pytest.mark.parametrize("name", NAMES)
def test_features_have_the_stated_strides_and_channels(name, output_stride, size):
    encoder = segmenter.build_encoder(name, output_stride=output_stride)
    x = jnp.zeros((2, *size, 3))
    features, _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), x, False))
    strides = [min(s, output_stride) for s in nominal_strides(encoder)]
    assert [f.shape for f in features] == [
        (2, *(-(-n // s) for n in size), c) for s, c in zip(strides, CHANNELS[name], strict=True)
    ]


@pytest.mark.parametrize("name", [*DILATING, "mobilenet_v2_tf"])
def test_dilation_computes_the_strided_features_more_densely(name):
    """Of the dilated features every fourth (or second) is the strided network's."""
    x = noise(1, 65, 65, 3)
    strided = segmenter.build_encoder(name, output_stride=32)
    variables = random_variables(strided, x)
    expected = jax.jit(strided.apply, static_argnums=2)(variables, x, False)
    for output_stride in (8, 16):
        dilated = segmenter.build_encoder(name, output_stride=output_stride)
        features = jax.jit(dilated.apply, static_argnums=2)(variables, x, False)
        for level, (ours, theirs) in enumerate(zip(features, expected, strict=True)):
            step = max(nominal_strides(dilated)[level] // output_stride, 1)
            np.testing.assert_allclose(
                ours[:, ::step, ::step], theirs, atol=2e-5 * np.abs(theirs).max()
            )


@pytest.mark.parametrize("output_stride", [8, 16])
def test_the_unet_is_the_same_in_torch(output_stride):
    """Two convolutions with BatchNorm a scale; the fifth scale strides or, at 8, dilates."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = noise(2, 35, 50, 3)
    encoder = segmenter.build_encoder("unet", output_stride=output_stride, widths=(3, 5, 4, 6, 7))
    variables = random_variables(encoder, x)

    def layer(y, scale, name, stride, dilation):
        params = variables["params"][scale][name]
        stats = variables["batch_stats"][scale][name]["norm"]
        kernel = torch.tensor(params["conv"]["kernel"]).permute(3, 2, 0, 1)
        y = functional.conv2d(y, kernel, stride=stride, padding=dilation, dilation=dilation)
        args = (stats["mean"], stats["var"], params["norm"]["scale"], params["norm"]["bias"])
        return functional.relu(functional.batch_norm(y, *map(torch.tensor, args)))

    expected, y = [], torch.tensor(x).permute(0, 3, 1, 2)
    for i in range(5):
        dilates = output_stride == 8 and i == 4
        y = layer(y, f"scale_{i}", "conv0", 2 if i and not dilates else 1, 1)
        y = layer(y, f"scale_{i}", "conv1", 1, 2 if dilates else 1)
        expected.append(y.permute(0, 2, 3, 1).numpy())
    for ours, theirs in zip(encoder.apply(variables, x, False), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_multi_grid_multiplies_the_dilations_of_the_last_stage():
    torch = pytest.importorskip("torch")
    from dilaff_jax.interop import torch_layout, torchvision_import
    from dilaff_jax.models import classifier

    theirs = torchvision_import.torchvision().models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, True]
    )
    for block, rate in zip(theirs.layer4, (2, 4, 8), strict=True):
        block.conv2.dilation = block.conv2.padding = (rate, rate)
    encoder = segmenter.build_encoder("resnet50", output_stride=16, multi_grid=(1, 2, 4))
    model = classifier.Classifier(encoder)
    x = np.random.default_rng(0).integers(0, 256, (1, 65, 65, 3)).astype(np.uint8)
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    template = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), template)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = torch_layout.from_torch(model, template, state)
    pixels = (x - np.array(encoder.mean)) / np.array(encoder.std)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(pixels).float().permute(0, 3, 1, 2)).numpy()
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_fewer_stages_are_the_beginning_of_the_whole():
    x = noise(1, 33, 33, 3)
    whole = segmenter.build_encoder("resnet18", output_stride=16)
    variables = random_variables(whole, x)
    part = segmenter.build_encoder("resnet18", output_stride=16, stages=3)
    ours = part.apply(variables, x, False)
    assert len(ours) == 4
    for a, b in zip(ours, whole.apply(variables, x, False)[:4], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_gradient_reaches_every_parameter(name):
    x = noise(2, 33, 33, 3)
    encoder = build(name, **SHORT[name])
    variables = random_variables(encoder, x)

    @jax.jit
    def gradient(params):
        def loss(params):
            features, _ = encoder.apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            # Weighted: the sum of what a LayerNorm gives is always the same.
            return sum(jnp.sum(jnp.sin(f) * jnp.arange(f.shape[-1])) for f in features)

        return jax.grad(loss)(params)

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(value).all(), path
        assert np.any(value != 0), path


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_computes_in_bfloat16_on_float32_parameters(name):
    x = noise(2, 33, 33, 3)
    full = build(name, **SHORT[name])
    half = build(name, layers.Style(dtype=jnp.bfloat16), **SHORT[name])
    variables = random_variables(full, x)

    def run(encoder, x):
        return jax.jit(lambda v, x: encoder.apply(v, x, True, mutable=["batch_stats"]))(
            variables, x
        )

    ours, state = run(half, jnp.asarray(x, jnp.bfloat16))
    expected, _ = run(full, x)
    initial = jax.eval_shape(lambda: half.init(jax.random.key(0), x, False))
    assert {v.dtype for v in jax.tree.leaves((initial, state))} == {jnp.dtype("float32")}
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert 0 < np.abs(a.astype(np.float32) - b).mean() < 0.03 * np.abs(b).mean()


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0", "unet", *TRANSFORMERS])
def test_remat_changes_neither_values_nor_gradients_nor_names(name):
    x = noise(1, 33, 33, 3)
    plain = build(name, **SHORT[name])
    variables = random_variables(plain, x)

    def run(encoder):
        def loss(params):
            features, state = encoder.apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            return sum(jnp.sum(f**2) for f in features), state

        function = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(function)(variables["params"]), str(
            jax.make_jaxpr(function)(variables["params"])
        )

    expected, plain_program = run(plain)
    ours, program = run(build(name, layers.Style(remat=True), **SHORT[name]))
    assert "remat" not in plain_program
    assert "remat" in program
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    largest = max(np.abs(v).max() for v in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)


def run_norm(style, x, train, variables=None):
    layer = layers.ConvNorm(x.shape[-1], style=style, activation=None)
    variables = variables or random_variables(layer, x)
    out, state = layer.apply(variables, x, train, mutable=["batch_stats"])
    return out, state.get("batch_stats", {}), variables


def test_training_uses_the_batch_and_moves_the_running_statistics():
    x = noise(4, 5, 5, 6) * 3 + 1
    out, state, variables = run_norm(layers.Style(), x, True)
    scale, bias = (variables["params"]["norm"][k] for k in ("scale", "bias"))
    y = np.einsum("bhwc,cd->bhwd", x, variables["params"]["conv"]["kernel"][0, 0])
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    np.testing.assert_allclose(
        out, (y - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-3, atol=1e-4
    )
    before = variables["batch_stats"]["norm"]
    np.testing.assert_allclose(
        state["norm"]["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state["norm"]["var"], 0.9 * before["var"] + 0.1 * var, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_and_frozen_norm_use_the_running_statistics_and_leave_them(frozen):
    x = noise(4, 5, 5, 6) * 3 + 1
    out, state, variables = run_norm(layers.Style(frozen_norm=frozen), x, train=frozen)
    norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    y = np.einsum("bhwc,cd->bhwd", x, variables["params"]["conv"]["kernel"][0, 0])
    expected = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for key in stats:
        np.testing.assert_array_equal(state["norm"][key], stats[key])


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (40, 20), (7, 7), (74, 2)])
def test_group_norm_has_the_most_groups_up_to_32_that_divide_the_channels(channels, groups):
    torch = pytest.importorskip("torch")
    x = noise(2, 3, 4, channels)
    out, state, variables = run_norm(layers.Style(norm="group"), x, True)
    assert not state
    norm = {k: torch.tensor(np.asarray(v)) for k, v in variables["params"]["norm"].items()}
    y = np.einsum("bhwc,cd->bhwd", x, variables["params"]["conv"]["kernel"][0, 0])
    expected = torch.nn.functional.group_norm(
        torch.tensor(y).permute(0, 3, 1, 2), groups, norm["scale"], norm["bias"]
    )
    np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-4)


def test_synchronised_batch_norm_on_four_devices_equals_one_device_with_the_whole_batch():
    if jax.local_device_count() < 4:
        pytest.skip("needs 4 devices")
    x = noise(8, 33, 33, 3) * np.arange(1, 9, dtype=np.float32)[:, None, None, None]
    alone = segmenter.build_encoder("resnet18", **SHORT["resnet18"])
    variables = random_variables(alone, x)

    def run(encoder, x):
        return encoder.apply(variables, x, True, mutable=["batch_stats"])

    expected, expected_state = jax.jit(functools.partial(run, alone))(x)
    synced = segmenter.build_encoder(
        "resnet18", layers.Style(axis_name="batch"), **SHORT["resnet18"]
    )
    mapped = jax.pmap(functools.partial(run, synced), axis_name="batch", devices=jax.devices()[:4])
    ours, state = mapped(x.reshape(4, 2, *x.shape[1:]))
    for a, b in zip(ours, expected, strict=True):
        a = np.asarray(a).reshape(b.shape)
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        for device in a:
            np.testing.assert_allclose(device, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(7, 7), (8, 7), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_pads_as_tensorflow_does(size, stride, dilation):
    """ceil(n/stride) outputs; of an odd number of padded pixels the end gets one more."""
    layer = layers.ConvNorm(
        1, 3, stride, dilation, padding="same", activation=None, style=layers.Style()
    )
    x = noise(1, *size, 1)
    variables = layer.init(jax.random.key(0), x, False)
    kernel = np.asarray(variables["params"]["conv"]["kernel"])[..., 0, 0]
    begin, out = [], []
    for n in size:
        out.append(-(-n // stride))
        begin.append(max((out[-1] - 1) * stride + 2 * dilation + 1 - n, 0) // 2)
    expected = np.zeros(out)
    for i, j in np.ndindex(*out):
        for u, v in np.ndindex(3, 3):
            y, z = i * stride - begin[0] + u * dilation, j * stride - begin[1] + v * dilation
            if 0 <= y < size[0] and 0 <= z < size[1]:
                expected[i, j] += kernel[u, v] * x[0, y, z, 0]
    ours = layer.apply(variables, x, False)[0, ..., 0]
    np.testing.assert_allclose(ours, expected / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, "encoder is 'resnet19'.*resnet18"),
        ({"name": "resnet50", "output_stride": 4}, "output_stride is 4; allowed: 8, 16, 32"),
        ({"name": "resnet50", "multi_grid": (1, 2)}, r"multi_grid is \(1, 2\); expected 3 factors"),
        ({"name": "resnet50", "multi_grid": (1, 0, 2)}, "expected positive integers"),
        ({"name": "mobilenet_v2", "multi_grid": (1, 2, 4)}, "no such option"),
        ({"name": "resnet50", "stages": 5}, "stages is 5; allowed: 1, 2, 3, 4"),
        ({"name": "resnet50", "depth": 3}, "encoder_options has no key 'depth'.*depths"),
        ({"name": "mobilenet_v2", "padding": "valid"}, "padding is 'valid'.*'same'"),
        ({"name": "unet", "widths": ()}, r"widths are \(\); give one or more"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message):
    def build(name, **options):
        encoder = segmenter.build_encoder(name, **options)
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 33, 33, 3)), False))

    with pytest.raises(ValueError, match=message):
        build(**options)


def test_modules_are_flax_modules_without_state_of_their_own():
    encoder = segmenter.build_encoder("resnet18")
    assert isinstance(encoder, nn.Module)
    assert encoder == segmenter.build_encoder("resnet18")
    assert hash(encoder) == hash(segmenter.build_encoder("resnet18"))
