"""Exported files: equal to the model, at any size, read without the package, damaged ones refused."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import propagate
from dilaff_jax.errors import UserError
from dilaff_jax.export import onnx, saved_model, stablehlo
from dilaff_jax.serving import network
from tests import data_files
from tests import tiny_run as runs

IMAGES = np.stack([data_files.picture(48, 40, seed) for seed in range(3)])
WIDE = np.stack([data_files.picture(64, 96, seed) for seed in range(2)])


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.zip"
    return path, stablehlo.write(network.from_run(tiny_run)[0], path)


# What docs show, and all that a stranger needs.
STRANGER = """
import json, sys, zipfile
import jax, numpy as np
from jax import export
with zipfile.ZipFile(sys.argv[1]) as file:
    program = export.deserialize(bytearray(file.read("program.bin")))
    about = json.loads(file.read("metadata.json"))
found = jax.jit(program.call)(np.load(sys.argv[2]))
assert not [name for name in sys.modules if name.startswith(("dilaff_jax", "flax"))]
np.savez(sys.argv[3], **found)
print(about["classes"]["names"])
"""


def test_the_file_runs_without_this_package_and_equals_the_model(exported, tiny_run, tmp_path):
    np.save(tmp_path / "in.npy", IMAGES)
    files = [str(exported[0]), str(tmp_path / "in.npy"), str(tmp_path / "out.npz")]
    said = subprocess.run(
        [sys.executable, "-c", STRANGER, *files], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(list(runs.NAMES))
    found = np.load(tmp_path / "out.npz")
    net = network.from_run(tiny_run)[0]
    logits, edges = jax.jit(net.apply)(net.variables, IMAGES)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5 * scale)
    np.testing.assert_allclose(found["affinity_logits"], edges, atol=1e-5 * np.abs(edges).max())
    for i, image in enumerate(IMAGES):
        labels, _, probs = runs.expected(tiny_run, image)
        np.testing.assert_array_equal(found["labels"][i], labels)
        np.testing.assert_allclose(found["probs"][i], probs, atol=1e-5 * scale)


def test_the_file_says_what_goes_in_and_comes_out(exported, tiny_run):
    path, metadata = exported
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == ["metadata.json", "program.bin"]
        assert json.loads(file.read("metadata.json")) == metadata
    assert metadata["platforms"] == ["cpu", "cuda", "tpu"]
    assert metadata["multiple"] == 1 or 8 % metadata["multiple"] == 0
    assert metadata["outputs"]["probs"].startswith("float32 (b, ")
    assert metadata["outputs"]["labels"].startswith("uint8 (b, ")
    assert len(metadata["offsets"]) == 16
    assert metadata["refine"] == {"name": "signed", "steps": 5, "strength": 0.1}


def test_a_file_is_loaded_as_a_run_is(exported, tiny_run):
    from_file, from_run = dilaff_jax.load(exported[0]), dilaff_jax.load(tiny_run)
    found, wanted = from_file(IMAGES[0]), from_run(IMAGES[0])
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.plain, wanted.plain)
    np.testing.assert_allclose(found.probs, wanted.probs, atol=1e-4)
    np.testing.assert_allclose(found.affinity, wanted.affinity, atol=1e-4)
    assert found.classes.names == runs.NAMES
    odd = from_file(IMAGES[0, :13, :29])  # neither a multiple nor the minimum
    assert odd.labels.shape == (13, 29)


def test_a_network_without_affinities_is_exported_too(tiny_plain_run, tmp_path):
    stablehlo.write(network.from_run(tiny_plain_run)[0], tmp_path / "plain.zip", platforms=["cpu"])
    found = dilaff_jax.load(tmp_path / "plain.zip")(IMAGES[1])
    np.testing.assert_array_equal(found.labels, runs.expected(tiny_plain_run, IMAGES[1])[0])
    assert found.affinity is None


def test_a_network_that_computes_with_its_size_is_exported_for_one_size(tiny_run, tmp_path):
    net = network.from_run(tiny_run)[0]

    def apply(variables, images):
        return net.apply(variables, images[:, : int(images.shape[1])])

    rigid = dataclasses.replace(net, apply=apply)
    with pytest.raises(ValueError, match="one size, --size=HEIGHT,WIDTH"):
        stablehlo.write(rigid, tmp_path / "rigid.zip")
    assert not (tmp_path / "rigid.zip").exists()
    metadata = stablehlo.write(rigid, tmp_path / "rigid.zip", size=(64, 64), platforms=["cpu"])
    assert metadata["size"] == [64, 64]
    model = dilaff_jax.load(tmp_path / "rigid.zip")
    np.testing.assert_array_equal(
        model(IMAGES[0]).labels, dilaff_jax.load(tiny_run, pad=64)(IMAGES[0]).labels
    )
    with pytest.raises(ValueError, match="was exported for 64 x 64"):
        model(data_files.picture(65, 64))


def test_a_damaged_or_foreign_file_is_refused(exported, tmp_path):
    damaged = bytearray(exported[0].read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "damaged.zip").write_bytes(damaged)
    (tmp_path / "cut.zip").write_bytes(damaged[:-2000])
    (tmp_path / "text.zip").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("metadata.json", '{"format": "other"}')
    for path in tmp_path.glob("*.zip"):
        with pytest.raises(
            ValueError, match=r"is no file that dilaff_jax\.export wrote, or damaged"
        ):
            dilaff_jax.load(path)


def test_the_command_exports_and_says_what(tiny_run, tmp_path, capsys):
    file = tmp_path / "new" / "model.zip"
    assert stablehlo.main([str(tiny_run), str(file), "--platforms=cpu", "--size=64,96"]) == 0
    assert "input: images, uint8 (b, 64, 96, 3): RGB" in capsys.readouterr().out
    assert file.is_file()
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .* is no run"):
        stablehlo.main([str(tmp_path), str(file)])


def test_an_onnx_file_equals_the_model(tiny_run, tmp_path):
    pytest.importorskip("jax2onnx", reason="needs: pip install --no-deps jax2onnx, extra [onnx]")
    net = network.from_run(tiny_run)[0]
    onnx.write(net, tmp_path / "model.onnx", (64, 96))
    worst = onnx.compare(net, tmp_path / "model.onnx", (64, 96))
    assert worst.keys() == {"labels", "probs", "logits", "affinity_logits"}
    assert worst["labels"] == 0
    assert max(worst.values()) < 1e-4  # the logits are of the order of ten


def random_logits(*shape):
    return np.random.default_rng(3).normal(0, 3, shape).astype(np.float32)


# Encoder with options, decoder, output stride; and the multiple that sizes have to be of.
SMALL = {"width": 16, "depth": 2, "heads": 2, "hidden": 24}
TRANSFORMERS = {
    "segformer_b0": ("mit_b0", {}, "segformer", 32, 32),
    "dinov2": ("dinov2_vits14", SMALL, "linear", 16, 14),
    "dinov3": ("dinov3_vits16", SMALL, "linear", 16, 16),
}


def transformer(name, workdir):
    encoder, options, decoder, stride, multiple = TRANSFORMERS[name]
    run = runs.write(
        workdir,
        encoder=encoder,
        encoder_options=options,
        decoder=decoder,
        decoder_options={},
        output_stride=stride,
        affinity={"dilations": (1, 2), "sources": ("image", "decoder")},
    )
    return network.from_run(run)[0], multiple


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_exported_for_all_sizes_that_its_patches_divide(name, tmp_path):
    net, multiple = transformer(name, tmp_path / "run")
    stablehlo.write(net, tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        program = jax.export.deserialize(bytearray(file.read("program.bin")))
    for factors in ((4, 4), (5, 7)):
        images = data_files.picture(*(f * multiple for f in factors), 0)[None]
        logits, edges = jax.jit(net.apply)(net.variables, images)
        found = jax.jit(program.call)(images)
        for a, b in ((found["logits"], logits), (found["affinity_logits"], edges)):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_segformer_in_onnx_equals_the_model(tmp_path):
    """SegFormer-B0 whole, at a size fixed when it was converted."""
    pytest.importorskip("jax2onnx", reason="needs: pip install --no-deps jax2onnx, extra [onnx]")
    net, _ = transformer("segformer_b0", tmp_path / "run")
    onnx.write(net, tmp_path / "model.onnx", (64, 96))
    worst = onnx.compare(net, tmp_path / "model.onnx", (64, 96))
    logits, _ = jax.jit(net.apply)(net.variables, WIDE[:1])
    assert worst["logits"] < 1e-4 * np.abs(logits).max()


@pytest.fixture(scope="module")
def affinities(tmp_path_factory):
    """The workdir of an affinity network by itself."""
    from tests import tiny_run

    return tiny_run.write(tmp_path_factory.mktemp("alone") / "run", segmentation=None)


@pytest.mark.parametrize(("size", "classes"), [(None, 3), ((64, 96), 5)])
def test_a_refiner_is_a_function_of_images_and_logits(
    size, classes, tiny_run, affinities, tmp_path
):
    """Of a network that segments, and of one that has affinities alone: any stride and classes."""
    for workdir in (tiny_run, affinities):
        net = network.from_run(workdir)[0]
        path = tmp_path / "refiner.zip"
        metadata = stablehlo.write(net, path, size=size, platforms=("cpu",), refiner=classes)
        assert metadata["logits"] == f"float32 (b, p, q, {classes}): another network's"
        with zipfile.ZipFile(path) as file:
            exported = jax.export.deserialize(bytearray(file.read("program.bin")))
        _, affinity_logits = jax.jit(net.apply)(net.variables, WIDE)
        for stride in (1, 8):
            logits = random_logits(2, 64 // stride, 96 // stride, classes)
            logits[:, :, :, 1] = -np.inf
            found = exported.call(WIDE, logits)
            labels, probs = propagate.refine_logits(
                logits, affinity_logits, net.offsets, (64, 96), propagate.operator(**net.refine)
            )
            np.testing.assert_array_equal(found["labels"], labels)
            np.testing.assert_allclose(found["probs"], probs, atol=2e-4)
            assert not (np.asarray(found["labels"]) == 1).any()
        loaded, own = dilaff_jax.load(path), dilaff_jax.load(workdir)
        logits = random_logits(8, 12, 3)
        wanted = own.refine(WIDE[0], logits).probs
        np.testing.assert_allclose(loaded.refine(WIDE[0], logits).probs, wanted, atol=2e-4)
        with pytest.raises(UserError, match="affinity network by itself"):
            loaded(WIDE[0])


def test_affinities_alone_are_no_segmentation_to_export(
    affinities, tiny_plain_run, tmp_path, capsys
):
    with pytest.raises(UserError, match="which has no logits of its own; as a refiner"):
        stablehlo.program(network.from_run(affinities)[0])
    with pytest.raises(UserError, match="has no affinity head, so it cannot refine"):
        stablehlo.write(network.from_run(tiny_plain_run)[0], tmp_path / "x.zip", refiner=3)
    file = tmp_path / "model.zip"
    assert stablehlo.main([str(affinities), str(file), "--platforms=cpu", "--size=64,96"]) == 0
    assert "input: logits, float32 (b, p, q, 3): another network's" in capsys.readouterr().out


def test_an_onnx_refiner_takes_what_a_torch_network_says(affinities, tmp_path):
    """The whole way of somebody without JAX: logits by torch, refined by onnxruntime."""
    pytest.importorskip("jax2onnx", reason="needs: pip install --no-deps jax2onnx, extra [onnx]")
    import onnxruntime
    import torch

    net = network.from_run(affinities)[0]
    path = tmp_path / "refiner.onnx"
    onnx.write(net, path, (64, 96), (8, 12, 5))
    worst = onnx.compare(net, path, (64, 96), (8, 12, 5))
    assert worst["labels"] == 0
    assert worst["probs"] < 1e-4
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(3, 5, 8, stride=8)
    image = torch.tensor(WIDE[:1], dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(image.permute(0, 3, 1, 2) / 64).permute(0, 2, 3, 1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [labels] = session.run(["labels"], {"images": image.numpy(), "logits": logits.numpy()})
    wanted = dilaff_jax.load(affinities).refine(WIDE[0], logits)
    np.testing.assert_array_equal(labels[0], wanted.labels)


def test_what_is_converted_to_onnx_is_written_for_no_platform(tiny_run):
    net = network.from_run(tiny_run)[0]
    x = jnp.asarray(IMAGES[:1], jnp.float32)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert "platform_index" in str(jax.make_jaxpr(stablehlo.program(net))(shape))
    names, function = onnx.flattened(net, shape)
    assert "platform" not in str(jax.make_jaxpr(function)(shape))
    wanted = jax.jit(stablehlo.program(net))(x)
    for name, value in zip(names, jax.jit(function)(x), strict=True):
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-4)


def test_what_is_converted_to_onnx_has_jax_own_operations_alone(tmp_path):
    """Nothing that this package made for a GPU, which no converter knows."""
    net, _ = transformer("segformer_b0", tmp_path / "run")
    shape = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    assert "dilated_conv" in str(jax.make_jaxpr(stablehlo.program(net, "gpu"))(shape))
    _, function = onnx.flattened(net, shape)
    assert "dilated_conv" not in str(jax.make_jaxpr(function)(shape))


def test_without_the_converter_the_message_says_how_to_get_it(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match="pip install --no-deps jax2onnx"):
        onnx.write(network.from_run(tiny_run)[0], tmp_path / "model.onnx", (64, 96))


def test_a_saved_model_equals_the_model(tiny_run, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="needs the extra [tensorflow]")
    net = network.from_run(tiny_run)[0]
    saved_model.write(net, tmp_path / "saved")
    found = tf.saved_model.load(str(tmp_path / "saved")).segment(IMAGES)
    wanted = jax.jit(stablehlo.program(net))(IMAGES)
    for name, value in wanted.items():
        scale = max(1, np.abs(np.asarray(value, np.float32)).max())
        np.testing.assert_allclose(found[name].numpy(), value, atol=1e-5 * scale)
