"""The rooms of the package: their size, what they may know, what they offer."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import dilaff_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = [p for p in sorted((ROOT / "dilaff_jax").rglob("*.py")) if "configs" not in p.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_and_its_functions_can_be_seen_whole(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def lint(folder):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    command += [str(folder / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_an_import_that_runs_upward_is_found(tmp_path):
    """The contracts of pyproject.toml hold for the package, and not for one with such an import."""
    (tmp_path / "dilaff_jax").mkdir()
    for path in FILES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert lint(tmp_path).returncode == 0
    for file, line, contract in (
        ("affinity.py", "from dilaff_jax import train", "Nothing imports upward"),
        ("resize.py", "import flax", "The method needs JAX"),
        ("train.py", "import torch", "No TensorFlow and no torch"),
        ("evaluate.py", "import orbax.checkpoint", "One file knows Orbax"),
    ):
        path = tmp_path / "dilaff_jax" / file
        before = path.read_text()
        path.write_text(f"{before}\n{line}\n")
        found = lint(tmp_path)
        path.write_text(before)
        assert found.returncode == 1
        [verdict] = [x for x in found.stdout.splitlines() if x.startswith(contract)][:1]
        assert " BROKEN" in verdict


def test_the_public_names_are_there_and_imported_when_used():
    assert sorted(dilaff_jax.__all__) == [
        "Predictor",
        "Result",
        "UserError",
        "__version__",
        "load",
        "refine",
    ]
    for name in dilaff_jax.__all__:
        assert getattr(dilaff_jax, name)
        assert name in dir(dilaff_jax)
    with pytest.raises(AttributeError, match="no attribute 'predictor'"):
        dilaff_jax.predictor  # noqa: B018


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("compare", "report.compare_runs"),
        ("record", "report.run_summary"),
        ("onnx_export", "export.onnx"),
        ("tf_export", "export.saved_model"),
    ],
)
def test_former_names_of_commands_still_work(former, now):
    command = importlib.import_module(f"dilaff_jax.{former}")
    assert command.main is importlib.import_module(f"dilaff_jax.{now}").main
