"""Weights in torch's layout: files, names, round trips, refusals, folded BatchNorm."""

import argparse
import os
import pathlib
import pickle
import zipfile

import jax
import numpy as np
import pytest
from absl import logging

from dilaff_jax.errors import UserError
from dilaff_jax.interop import files, pretrained, torch_layout
from dilaff_jax.models import classifier, segmenter
from tests.test_encoders import SHORT
from tests.test_models import SMALL, photos, variables_of

STATE = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "a.bias": np.array([1.5, -2.5], np.float16),
    "b.num_batches_tracked": np.array(7, np.int64),
}


def small(**change):
    model = segmenter.build(SMALL | change, 5)
    return model, variables_of(model, photos())


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_file_gives_back_what_was_written(tmp_path, suffix):
    if suffix in (".pth", ".pt"):
        pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    files.write(path, STATE)
    back = files.read(path)
    assert set(back) == set(STATE)
    for key, value in STATE.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


def test_a_pickled_torch_file_is_refused_unrun(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "bomb.pth"
    torch.save({"a.weight": Bomb()}, path)
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read"):
        files.read(path)


def test_a_pickled_numpy_file_is_refused_unrun(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez(path, **{"a.weight": np.array([Bomb()], dtype=object)})
    with pytest.raises(ValueError, match=r"bomb\.npz cannot be read"):
        files.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"bomb\.npz cannot be read|not arrays"):
        files.read(path)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_broken_file_is_named(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"PK\x03\x04 nothing of use")
    with pytest.raises(ValueError, match=f"broken{suffix} cannot be read as {suffix}"):
        files.read(path)


def test_other_suffixes_and_absent_files_are_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.touch()
    with pytest.raises(ValueError, match=r"suffix is '.ckpt'; allowed: .pth"):
        files.read(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file"):
        files.read(tmp_path / "absent.npz")


def test_a_training_checkpoint_needs_its_entry_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, path)
    with pytest.raises(ValueError, match=r"holds model, epoch, which are not arrays.*`entry`"):
        files.read(path)
    np.testing.assert_array_equal(files.read(path, entry="model")["a"], [1, 1])
    with pytest.raises(ValueError, match="no entry 'state'; it holds model, epoch"):
        files.read(path, entry="state")


def make(path):
    pathlib.Path(path).mkdir()


class Sneaky:
    def __init__(self, path, function=make):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


def test_a_training_checkpoint_with_objects_is_read_and_nothing_of_it_is_run(tmp_path):
    """As torchvision's references write it, and with what nobody should run."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "checkpoint.pth"
    content = {
        "model": {"a": torch.arange(3.0)},
        "args": argparse.Namespace(lr=0.1, path=tmp_path),
        "scores": np.float64(0.5),
        "sneaky": Sneaky(tmp_path / "was_run"),
    }
    torch.save(content, path)
    np.testing.assert_array_equal(files.read(path, entry="model")["a"], [0, 1, 2])
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(ValueError, match="holds model, args, scores, sneaky, which are not arrays"):
        files.read(path)


def test_a_file_that_asks_for_the_system_is_refused_without_advice_to_run_it(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": Sneaky(tmp_path / "was_run", os.mkdir)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"cannot be read as .pth: it asks for code") as caught:
        files.read(tmp_path / "a.pth")
    assert "posix.mkdir" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "encoder.", "a.b.c."])
def test_a_prefix_of_all_names_is_found_and_said(prefix, tmp_path, caplog):
    logging.use_absl_handler()
    model, variables = small()
    changed = jax.tree.map(lambda v: v + 1, variables)
    path = tmp_path / "model.npz"
    state = torch_layout.to_torch(model, changed)
    files.write(path, {f"{prefix}{k}": v for k, v in state.items()} | {"loss.w": np.zeros(2)})
    assert same(pretrained.load_model(model, variables, path), changed)
    said = caplog.text
    assert f"the weights stand below '{prefix}' in the file; 1 keys elsewhere are not used" in said
    assert "loss.w" in said


def test_a_backbone_is_found_within_a_whole_network(tmp_path):
    path, theirs = classification_file(tmp_path)
    state = {f"module.encoder.{k}": v for k, v in files.read(path).items()}
    files.write(path, state | {"module.decoder.weight": np.zeros(3)})
    model, variables = small()
    loaded = pretrained.load_backbone(model, variables, path)
    assert same(loaded["params"]["encoder"], theirs["params"]["encoder"])


def test_weights_that_stand_twice_are_chosen_by_drop(tmp_path):
    path, theirs = classification_file(tmp_path)
    state = files.read(path)
    both = {f"student.{k}": v for k, v in state.items()}
    both |= {f"teacher.{k}": v + 1 for k, v in state.items() if v.dtype == np.float32}
    both |= {f"teacher.{k}": v for k, v in state.items() if v.dtype != np.float32}
    files.write(path, both)
    model, variables = small()
    with pytest.raises(torch_layout.KeyMismatchError, match=r"2 times, below student., teacher.;"):
        pretrained.load_backbone(model, variables, path)
    loaded = pretrained.load_backbone(model, variables, path, drop=["teacher.*"])
    assert same(loaded["params"]["encoder"], theirs["params"]["encoder"])


def test_bfloat16_of_torch_is_read_as_float32(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor([1.5, 3.25], dtype=torch.bfloat16)}, tmp_path / "a.pth")
    np.testing.assert_array_equal(files.read(tmp_path / "a.pth")["a"], [1.5, 3.25])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize(
    "change", [{}, {"decoder": "unet", "decoder_options": {"widths": (8,)}}, {"norm": "group"}]
)
def test_a_model_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, suffix, change):
    if suffix == ".pth":
        pytest.importorskip("torch")
    model, variables = small(**change)
    path = tmp_path / f"model{suffix}"
    pretrained.save_model(model, variables, path)
    zeros = jax.tree.map(np.zeros_like, variables)
    assert same(pretrained.load_model(model, zeros, path), variables)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", "resnet18", "mobilenet_v2"])
def test_torchvision_to_flax_to_torchvision_is_bit_exact(name):
    torch = pytest.importorskip("torch")
    from dilaff_jax.interop import torch_models

    model, theirs = torch_models.pair(name, seed=0)
    with torch.no_grad():
        for buffer_name, value in theirs.named_buffers():
            if "running" in buffer_name:
                value.uniform_(0.5, 1.5)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), photos(1), train=False))
    template = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), template)
    back = torch_layout.to_torch(model, torch_layout.from_torch(model, template, state))
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype, key
        assert back[key].tobytes() == value.tobytes(), key
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in back.items()}, strict=True)


def test_every_key_that_does_not_fit_is_listed():
    model, variables = small()
    state = torch_layout.to_torch(model, variables)
    del state["backbone.conv1.weight"], state["classifier.1.running_var"]
    state["backbone.fc.weight"] = np.zeros((5, 5))
    state["classifier.4.bias"] = np.zeros(7, np.float32)
    with pytest.raises(torch_layout.KeyMismatchError) as error:
        torch_layout.from_torch(model, variables, state)
    message = str(error.value)
    assert "2 missing" in message
    assert "backbone.conv1.weight" in message
    assert "classifier.1.running_var" in message
    assert "1 not in the model:\n  backbone.fc.weight" in message
    assert "1 of another shape:\n  classifier.4.bias (7,), expected (5,)" in message


def test_another_number_of_classes_is_loaded_only_when_said_so():
    model, variables = small()
    state = torch_layout.to_torch(model, variables)
    other = segmenter.build(SMALL, 3)
    fresh = variables_of(other, photos())
    with pytest.raises(torch_layout.KeyMismatchError, match="4 of another shape"):
        torch_layout.from_torch(other, fresh, state)
    last = ("classifier.4.*", "aux_classifier.4.*")
    loaded = torch_layout.from_torch(other, fresh, state, drop=last, keep=last)
    assert same(loaded["params"]["encoder"], variables["params"]["encoder"])
    assert same(loaded["params"]["decoder"]["logits"], fresh["params"]["decoder"]["logits"])


def test_a_pattern_that_fits_nothing_is_an_error():
    model, variables = small()
    state = torch_layout.to_torch(model, variables)
    with pytest.raises(torch_layout.KeyMismatchError, match=r"drop 'clasifier\.\*'"):
        torch_layout.from_torch(model, variables, state, drop=["clasifier.*"])
    with pytest.raises(torch_layout.KeyMismatchError, match=r"keep 'head\.\*'"):
        torch_layout.from_torch(model, variables, state, keep=["head.*"])


def classification_file(tmp_path, seed=1):
    """A ResNet classifier's weights in torchvision's names."""
    encoder = segmenter.build_encoder("resnet18", **SHORT["resnet18"])
    model = classifier.Classifier(encoder, 10)
    variables = variables_of(model, photos())
    variables = jax.tree.map(lambda v: v + np.float32(0.01 * seed), variables)
    path = tmp_path / "resnet.npz"
    files.write(path, torch_layout.to_torch(model, variables))
    return path, variables


def test_a_backbone_is_loaded_without_its_classification_head(tmp_path):
    path, theirs = classification_file(tmp_path)
    model, variables = small()
    loaded = pretrained.load_backbone(model, variables, path)
    for collection in ("params", "batch_stats"):
        assert same(loaded[collection]["encoder"], theirs[collection]["encoder"])
        assert same(loaded[collection]["decoder"], variables[collection]["decoder"])
    assert same(loaded["params"]["affinity_head"], variables["params"]["affinity_head"])


def test_a_backbone_that_is_not_whole_is_refused_unless_said_so(tmp_path):
    path, theirs = classification_file(tmp_path)
    state = {k: v for k, v in files.read(path).items() if not k.startswith("layer2.1.conv1")}
    files.write(path, state)
    model, variables = small()
    with pytest.raises(torch_layout.KeyMismatchError, match=r"1 missing:\n  layer2\.1\.conv1"):
        pretrained.load_backbone(model, variables, path)
    loaded = pretrained.load_backbone(model, variables, path, keep=["layer2.1.conv1.*"])
    ours, fresh = (v["params"]["encoder"]["layer2_1"]["conv1"] for v in (loaded, variables))
    assert same(ours["conv"], fresh["conv"])
    assert same(ours["norm"], theirs["params"]["encoder"]["layer2_1"]["conv1"]["norm"])


def folded_file(tmp_path):
    """The same classifier with BatchNorm folded into weight and bias, and its variables."""
    path, variables = classification_file(tmp_path)
    model = classifier.Classifier(segmenter.build_encoder("resnet18", **SHORT["resnet18"]), 10)
    names = torch_layout.keys(model, variables)
    full, state = files.read(path), {}
    for (collection, *place), name in names.items():
        if place[-2:] == ["conv", "kernel"]:
            norm = [*place[:-2], "norm"]
            scale, bias = (full[names["params", *norm, k]] for k in ("scale", "bias"))
            mean, var = (full[names["batch_stats", *norm, k]] for k in ("mean", "var"))
            gain = scale / np.sqrt(var + 1e-5)
            state[name] = full[name] * gain[:, None, None, None]
            state[name.removesuffix("weight") + "bias"] = bias - mean * gain
        elif place[0] == "fc":
            assert collection == "params"
            state[name] = full[name]
    files.write(path, state)
    return path, model, variables


@pytest.mark.parametrize("calibrated", [False, True])
def test_folded_weights_compute_what_the_whole_ones_do(tmp_path, calibrated):
    path, _, theirs = folded_file(tmp_path)
    model, variables = small()
    x = photos(8)
    loaded = pretrained.load_backbone(
        model, variables, path, folded=True, calibration_images=x if calibrated else None
    )

    def features(variables, train):
        part = {c: v["encoder"] for c, v in variables.items()}
        y = segmenter.normalise(x, model.encoder)
        return model.encoder.apply(part, y, train, mutable=["batch_stats"])[0][-1]

    expected = features(theirs, False)
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(features(loaded, False), expected, atol=tolerance)
    # On the images it was calibrated on, training starts from the same function.
    in_training = np.abs(features(loaded, True) - expected).max() < 10 * tolerance
    assert in_training == calibrated
    assert same(loaded["params"]["decoder"], variables["params"]["decoder"])
    assert same(loaded["batch_stats"]["decoder"], variables["batch_stats"]["decoder"])


def test_an_unfolded_file_read_as_folded_is_refused(tmp_path):
    path, _ = classification_file(tmp_path)
    files.write(path, {k: v for k, v in files.read(path).items() if ".bn" not in k})
    model, variables = small()
    with pytest.raises(torch_layout.KeyMismatchError, match="missing"):
        pretrained.load_backbone(model, variables, path, folded=True)


def test_folded_weights_need_a_batch_norm_to_unfold_into(tmp_path):
    path, *_ = folded_file(tmp_path)
    model, variables = small(norm="group")
    with pytest.raises(ValueError, match="folded weights need norm='batch'"):
        pretrained.load_backbone(model, variables, path, folded=True)


def test_the_kernels_of_volumes_are_torchs():
    """A convolution in three dimensions, whose kernel has a place for each axis."""
    torch = pytest.importorskip("torch", reason="needs the extra [torch]")
    config = {
        "encoder": "unet",
        "encoder_options": {"widths": (3, 4), "mean": (0.0,), "std": (1.0,)},
        "decoder": "unet",
        "decoder_options": {"widths": (3,)},
        "norm": "instance",
        "ndim": 3,
    }
    model = segmenter.build(config, 2)
    volume = np.random.default_rng(0).normal(size=(1, 6, 5, 7, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), volume, train=False)
    state = torch_layout.to_torch(model, variables)
    [name] = [n for n, v in state.items() if v.shape == (3, 1, 3, 3, 3)]
    kernel = next(v for v in jax.tree.leaves(variables["params"]) if v.shape == (3, 3, 3, 1, 3))
    ours = jax.lax.conv_general_dilated(
        volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    theirs = torch.nn.functional.conv3d(
        torch.from_numpy(np.moveaxis(volume, -1, 1)), torch.from_numpy(state[name]), padding=1
    )
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), theirs, atol=1e-5)
    back = torch_layout.from_torch(model, variables, state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_heads_without_a_counterpart_in_torch_go_there_and_back():
    config = {
        "encoder": "unet",
        "encoder_options": {"widths": (4, 6, 8)},
        "decoder": "unet",
        "decoder_options": {"widths": (6,)},
        "output_stride": 16,
        "affinity": {"sources": ("stride4",), "rates": (), "embedding": 3},
        "boundaries": {"sides": ("stride1", "stride2"), "last": "stride4"},
    }
    model = segmenter.build(config, 3)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8), train=False)
    state = torch_layout.to_torch(model, variables)
    assert {"affinity_head.sharpness", "boundary_head.fuse"} <= state.keys()
    back = torch_layout.from_torch(model, variables, state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
