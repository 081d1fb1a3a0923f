"""The package as it is installed from a wheel, away from its repository."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTENT = ("dilaff_jax", "configs", "README.md", "LICENSE", "pyproject.toml", "requirements.txt")
OWN_CONFIG = """
from dilaff_jax.configs import default


def get_config():
    config = default.get_config()
    config.num_steps, config.batch_size = 1, 2
    config.data.update({"dataset": "shapes/tiny", "crop_size": (32, 32)})
    config.model.update({"encoder": "resnet18", "decoder": "fcn"})
    config.model.encoder_options = {"stages": 1}
    config.model.affinity.update({"width": 8, "rates": (1,)})
    config.eval.update({"batch_size": 2, "boundaries": False, "pictures": 0})
    config.parallel.devices = 1
    return config
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel holds, and the script that pip makes of its entry point."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    # A copy, as building leaves folders beside the sources.
    source = tmp_path_factory.mktemp("source") / "repository"
    tracked = subprocess.run(
        ["git", "ls-files", *CONTENT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], check=True)
    [wheel] = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return site


def run(site, cwd, *command, code=0):
    """A command elsewhere, with the installed package instead of the repository's."""
    ended = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stderr
    return ended


def test_the_configs_come_along_and_nothing_else_does(site):
    assert {p.name for p in (ROOT / "configs").glob("*.py")} == {
        p.name for p in (site / "dilaff_jax" / "configs").glob("*.py")
    }
    assert not (site / "configs").exists()
    assert not (site / "tests").exists()
    assert list((site / "dilaff_jax" / "ablation" / "report").glob("*.j2"))


def test_a_config_of_ones_own_trains_in_a_project_with_configs_of_its_own(site, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not meant')\n")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(OWN_CONFIG)
    dilaff = str(site / "bin" / "dilaff")
    data = "from dilaff_jax.data import prepare, shapes; prepare.prepare('shapes/tiny', 'data', "
    data += "options=shapes.ShapesOptions(size=32, train=4, validation=2, test=2))"
    run(site, tmp_path, sys.executable, "-c", data)
    where = "import dilaff_jax; print(dilaff_jax.__file__)"
    found = run(site, tmp_path, sys.executable, "-c", where).stdout.strip()
    assert pathlib.Path(found).is_relative_to(site)
    run(
        *(site, tmp_path, sys.executable, dilaff),
        *("--config=experiments/mine.py", "--workdir=run"),
    )
    assert (tmp_path / "run" / "evaluation" / "1" / "results.json").exists()
    # From another folder, by the module.
    (tmp_path / "elsewhere").mkdir()
    run(
        *(site, tmp_path / "elsewhere", sys.executable, "-m", "dilaff_jax.main", "--mode=eval"),
        *("--config=../experiments/mine.py", "--workdir=../run", "--config.data.data_dir=../data"),
    )


def test_a_config_of_the_package_is_found_from_anywhere_and_said_to_be(site, tmp_path):
    ended = run(
        *(site, tmp_path, sys.executable, str(site / "bin" / "dilaff")),
        *("--config=configs/shapes_quickstart.py", "--workdir=run", "--config.num_steps=0"),
        code=1,
    )
    installed = site / "dilaff_jax" / "configs" / "shapes_quickstart.py"
    assert f"configs/shapes_quickstart.py is taken from {installed}" in ended.stderr
    assert "UserError: config.num_steps is 0" in ended.stderr
    ended = run(
        *(site, tmp_path, sys.executable, str(site / "bin" / "dilaff")),
        *("--config=configs/no_such.py", "--workdir=run"),
        code=1,
    )
    assert "no_such.py" in ended.stderr
