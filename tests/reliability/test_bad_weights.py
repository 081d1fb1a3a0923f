"""Weights that do not fit, are damaged or would run code are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import initialise
from dilaff_jax.interop import files, pretrained
from dilaff_jax.models import segmenter
from tests import tiny_config
from tests.reliability import bad_files
from tests.reliability.place import cases, refused

# Weights.


@pytest.fixture(scope="module")
def network():
    config = tiny_config.get_config()
    model = segmenter.build(config.model, 3)
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return model, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


def safetensors_file():
    import safetensors.numpy

    return safetensors.numpy.save({"a": np.zeros((4, 4), np.float32)})


def list_file(evil):
    torch = pytest.importorskip("torch")
    path = evil.with_name("list.pth")
    torch.save([1, 2], path)
    data = path.read_bytes()
    path.unlink()
    return data


WEIGHTS = cases(
    ("another suffix", "w.bin", lambda evil: b"x", "cannot be read as .bin: ..."),
    ("pth with code", "w.pth", lambda evil: bad_files.torch_file(bad_files.harmful_pickle(evil)), "holds fc.weight, which are not arrays; where the weights stand under one of these keys, name it as `entry`"),
    ("old pth with code", "w.pt", bad_files.harmful_pickle, "cannot be read as .pt: ..."),
    ("pth that is none", "w.pth", lambda evil: b"", "cannot be read as .pth: ..."),
    ("pth with a list", "w.pth", list_file, "cannot be read as .pth: it holds a list, not a dict of weights"),
    ("npz of objects", "w.npz", lambda evil: bad_files.npz(a=np.array([bad_files.Harm(evil)], object)), "cannot be read as .npz: Object arrays cannot be loaded when allow_pickle=False"),
    ("npz that is a pickle", "w.npz", bad_files.harmful_pickle, "cannot be read as .npz: ..."),
    ("half an npz", "w.npz", lambda evil: bad_files.npz(a=np.zeros(500))[:900], "cannot be read as .npz: ..."),
    ("empty npz", "w.npz", lambda evil: b"", "cannot be read as .npz: ..."),
    ("npy as npz", "w.npz", lambda evil: bad_files.npz(a=np.zeros(5))[30:], "cannot be read as .npz: ..."),
    ("half a safetensors", "w.safetensors", lambda evil: safetensors_file()[:-3], "cannot be read as .safetensors: ..."),
    ("safetensors of a huge header", "w.safetensors", lambda evil: b"\xff" * 8 + safetensors_file()[8:], "cannot be read as .safetensors: ..."),
    ("empty safetensors", "w.safetensors", lambda evil: b"", "cannot be read as .safetensors: ..."),
)  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), WEIGHTS)
def test_weights_that_cannot_be_read_are_refused_and_no_code_runs(name, make, message, place):
    if name.endswith((".pth", ".pt")):
        pytest.importorskip("torch")
    evil = place.at / "evil"
    path = place.source / name
    path.write_bytes(make(evil))
    refused(place, lambda: files.read(path), f"{{AT}}/source/{name} {message}")
    assert not evil.exists()


def test_the_harmful_pickle_does_harm_where_it_is_run(place):
    """What the refusals above are worth: the same bytes, unpickled, create the file."""
    import pickle

    pickle.loads(bad_files.harmful_pickle(place.at / "evil"))
    assert (place.at / "evil").exists()


def test_a_file_of_weights_that_is_not_there_is_refused(place):
    path = place.at / "w.npz"
    refused(place, lambda: files.read(path), "{AT}/w.npz: no such file", FileNotFoundError)


def test_an_entry_that_is_not_there_is_refused(place):
    path = place.source / "w.npz"
    np.savez(path, a=np.zeros(3), b=np.zeros(3))
    message = "{AT}/source/w.npz has no entry 'model'; it holds a, b"
    refused(place, lambda: files.read(path, "model"), message)


def test_weights_of_a_package_that_is_not_there_are_refused(place):
    refused(
        place,
        lambda: initialise.weight_file("no_such_package:weights"),
        "config.init names 'no_such_package:weights', but there is no module 'no_such_package': pip "
        "install it, or give the path of a file",
    )


def test_weights_of_another_model_are_refused_with_every_key(place, network):
    model, variables = network
    whole = place.source / "whole.npz"
    pretrained.save_model(model, variables, whole)
    state = files.read(whole)
    first, second, *_ = [name for name in state if name.endswith("weight")]
    shape = state[second].shape
    state["something.else"] = state.pop(first)
    state[second] = state[second][:1]
    path = place.source / "w.npz"
    np.savez(path, **state)
    refused(
        place,
        lambda: pretrained.load_model(model, variables, path),
        "weights and model do not fit (`drop` names keys not to use, `keep` those to leave as "
        f"initialised)\n1 missing:\n  {first}\n1 not in the model:\n  something.else\n1 of another "
        f"shape:\n  {second} {(1, *shape[1:])}, expected {shape}",
    )
