"""What a person can change ends in one line; a fault of the program keeps its traceback."""

import ast
import os
import pathlib
import subprocess

import pytest

import dilaff_jax
from dilaff_jax import errors, evaluate, references, train
from dilaff_jax.data import prepare
from dilaff_jax.data.images import DataError
from dilaff_jax.interop.torch_layout import KeyMismatchError
from dilaff_jax.runtime import locks
from tests import data_files, running

PACKAGE = pathlib.Path(errors.__file__).parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"))


def test_a_fault_within_a_decoder_of_ones_own_keeps_its_traceback(data_dir, tmp_path):
    option = "--config.model.decoder=tests.tiny:FaultyDecoder"
    output = running.finish(running.start(data_dir, tmp_path / "run", option, devices=1), code=1)
    assert "Traceback (most recent call last)" in output
    assert "tests/tiny.py" in output
    assert "ValueError" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.tiny:None", "config.model.decoder names 'tests.tiny:None', but module"),
        ("no_such:Decoder", "but there is no module 'no_such': pip install it, or put its folder"),
        ("tests.no_such.module:X", "there is no module 'tests.no_such.module'"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(name, message, data_dir, tmp_path):
    option = f"--config.model.decoder={name}"
    output = running.finish(running.start(data_dir, tmp_path / "run", option, devices=1), code=1)
    assert "Traceback" not in output
    assert output.startswith("UserError: ")
    assert message in output


def test_a_reference_is_resolved_with_dots_and_what_its_module_raises_is_not_caught(tmp_path):
    assert references.resolve("dilaff_jax.errors:UserError.__name__", "key") == "UserError"
    with pytest.raises(errors.UserError, match="key is 'plain'; expected 'module:attribute'"):
        references.resolve("plain", "key")


def test_what_a_module_raises_while_it_is_imported_is_not_caught(tmp_path, monkeypatch):
    (tmp_path / "raises_on_import.py").write_text("raise ZeroDivisionError('its own')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError, match="its own"):
        references.resolve("raises_on_import:thing", "key")


def test_every_kind_of_user_error_is_a_value_error():
    kinds = (DataError, KeyMismatchError, locks.Taken, errors.NotFiniteError)
    for kind in (*kinds, errors.MissingPackageError):
        assert issubclass(kind, errors.UserError)
        assert issubclass(kind, ValueError)
    assert issubclass(errors.NotFiniteError, FloatingPointError)
    assert issubclass(errors.MissingPackageError, ImportError)


def test_the_package_raises_no_bare_value_error():
    """Each error of ours says what to change; `ValueError` alone is somebody else's."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            raised = node.exc if isinstance(node, ast.Raise) else None
            name = getattr(getattr(raised, "func", raised), "id", "")
            assert name not in ("ValueError", "FloatingPointError", "ImportError"), path


@pytest.mark.parametrize("url", ["az://bucket/run", "https://host/x", "hf://name"])
def test_a_url_is_refused_instead_of_becoming_a_folder(url, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = running.make_config(data_dir)
    there = running.make_config(url)
    given = running.make_config(data_dir)
    given.init.workdir = url
    for act in (
        lambda: train.train_and_evaluate(config, url),
        lambda: train.train_and_evaluate(config, pathlib.Path(url)),
        lambda: train.train_and_evaluate(there, tmp_path / "run"),
        lambda: train.train_and_evaluate(given, tmp_path / "run"),
        lambda: evaluate.evaluate_run(config, pathlib.Path(url)),
        lambda: dilaff_jax.load(url),
        lambda: prepare.prepare("shapes", url),
    ):
        # A run on the hub can be read, where its name is whole.
        says = (
            "here only disks are read and written: give|has lost a slash; give text|"
            "is no repository of the hub; give hf://"
        )
        with pytest.raises(errors.UserError, match=says):
            act()
    made = {p.name for p in tmp_path.iterdir()}
    assert made <= {"run"}, made


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_a_platform_that_is_not_there_is_one_line(mode, data_dir, tiny_run, tmp_path):
    (tmp_path / "in").mkdir()
    workdir = tmp_path / "run" if mode == "train" else tiny_run
    files = () if mode == "train" else (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'o'}")
    result = subprocess.run(
        [*running.command(data_dir, workdir, f"--mode={mode}"), *files],
        cwd=running.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "JAX finds no device: JAX_PLATFORMS is 'cuda'" in result.stderr
