"""`dilaff doctor`: what is there, what is missing, what is wrong."""

import collections
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest

from dilaff_jax.runtime import doctor

Usage = collections.namedtuple("Usage", "total used free")


def of(findings, what):
    (found,) = [f for f in findings if f.what == what]
    return found


def change_versions(monkeypatch, **versions):
    """As if these were installed; None: as if not."""
    installed = doctor._installed() | {k.replace("_", "-"): v for k, v in versions.items()}
    installed = {k: v for k, v in installed.items() if v is not None}
    monkeypatch.setattr(doctor, "_installed", lambda: installed)


def test_nothing_is_wrong_with_the_machine_of_the_tests_and_the_command_says_so(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "dilaff_jax.main", "doctor", f"--workdir={tmp_path / 'new'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = {line.split("  ")[0]: line for line in ran.stdout.splitlines()}
    assert f"{importlib.metadata.version('jax')}" in lines["jax"]
    assert "nothing is wrong" in lines
    assert "cpu" in lines["devices"]
    assert {"extra torch", "extra view", "extra huggingface", "shared memory"} <= lines.keys()
    assert not (tmp_path / "new").exists()


def test_what_is_missing_or_of_another_version_is_named_with_what_to_do(monkeypatch):
    change_versions(monkeypatch, scipy=None, optax="0.1.0", nicegui=None, jinja2="2.0")
    found = list(doctor.packages())
    assert of(found, "scipy") == ("scipy", "missing", "pip install 'scipy<2,>=1.14'")
    assert of(found, "optax").trouble == "pip install 'optax<0.3,>=0.2.8'"
    view = of(found, "extra view")  # nobody has to have it
    assert (view.found, view.trouble) == ("not there: pip install 'dilaff-jax[view]'", "")
    report = of(found, "extra report")
    assert report.trouble == "jinja2 2.0: pip install 'jinja2<4,>=3.1'"


def test_an_extra_of_which_a_part_is_there_says_which_part_is_not(monkeypatch):
    change_versions(monkeypatch, torch="2.13.0", torchvision=None)
    expected = "not there: pip install 'dilaff-jax[torch]' (lacks torchvision)"
    assert of(doctor.packages(), "extra torch").found == expected


def test_an_extra_that_asks_for_an_extra_of_another_package_needs_that_too(monkeypatch):
    change_versions(monkeypatch, libtpu=None)
    assert "lacks libtpu" in of(doctor.packages(), "extra preflight").found


@pytest.mark.parametrize(
    ("versions", "what", "says"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, "jax and jaxlib", "pip install jaxlib==0.10.2"),
        (
            {"opencv_python": "4.12", "opencv_python_headless": "4.12.0"},
            "opencv",
            "pip uninstall both",
        ),
    ],
)
def test_packages_that_do_not_go_together_are_named(monkeypatch, versions, what, says):
    change_versions(monkeypatch, **versions)
    assert says in of(doctor.packages(), what).trouble


def test_a_device_that_is_there_and_not_used_is_named(monkeypatch):
    exists = pathlib.Path.exists
    monkeypatch.setattr(pathlib.Path, "exists", lambda p: str(p) == "/dev/nvidia0" or exists(p))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    trouble = of(doctor.devices(), "devices").trouble
    assert trouble.startswith("this machine has a GPU, and JAX does not use it: pip install")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert of(doctor.devices(), "devices").trouble.endswith("JAX_PLATFORMS is cpu")


def test_no_device_at_all_is_a_finding_and_no_traceback(monkeypatch):
    def none():
        raise RuntimeError("Unknown backend: 'rocm'")

    monkeypatch.setattr(jax, "local_devices", none)
    assert "Unknown backend: 'rocm'" in of(doctor.devices(), "devices").trouble


def test_little_shared_memory_and_full_disks_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9e10, 8.9e10, 6.4e7))
    assert "--shm-size" in of(doctor.memory(), "shared memory").trouble
    disk = of(doctor.disks(tmp_path / "a" / "b"), "disk of the workdir")
    assert disk.found == f"0.1 GB free ({tmp_path})"
    assert "make room" in disk.trouble


def test_what_is_wrong_is_said_last_and_ends_the_command_with_1(monkeypatch, capsys):
    change_versions(monkeypatch, scipy=None)
    assert not doctor.report()
    *_, before, last = capsys.readouterr().out.splitlines()
    assert before == "WRONG: scipy (missing): pip install 'scipy<2,>=1.14'"
    assert last == "1 wrong"


@pytest.mark.parametrize(
    ("kind", "version", "chosen", "trouble"),
    [
        ("TPU v6 lite", "0.0.42.1", "", "libtpu 0.0.42.1 ends .* TPU v6e; .*libtpu==0.0.43.2"),
        ("TPU v6 lite", "0.0.42.1", "/own/libtpu.so", "^$"),
        ("TPU v6 lite", "0.0.43.2", "", "^$"),
        ("TPU v6 lite", "0.0.52", "", "^$"),
        ("TPU v6 lite", None, "", "^$"),
        ("TPU v5 lite", "0.0.42.1", "", "^$"),
    ],
)
def test_a_compiler_that_fails_on_a_chip_is_named(kind, version, chosen, trouble, monkeypatch):
    find = importlib.util.find_spec
    found = None if version is None else find("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "libtpu" else find(name)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setenv("TPU_LIBRARY_PATH", chosen)
    device = types.SimpleNamespace(device_kind=kind, platform="tpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert re.search(trouble, of(doctor.devices(), "devices").trouble)
