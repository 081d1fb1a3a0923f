"""What is imported when: a command line that only prints help must not wait for an accelerator."""

import subprocess
import sys

import pytest

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "torch", "scipy", "cv2"}


def imported(code):
    """The modules that a fresh interpreter holds after `code`."""
    report = "\nprint('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code + report],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_the_package_imports_no_library():
    assert not imported("import dilaff_jax") & (HEAVY | {"numpy", "absl", "ml_collections"})


@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
def test_help_imports_no_heavy_library(flag):
    code = f"""
import runpy
sys.argv = ["main", "{flag}"]
try:
    runpy.run_module("dilaff_jax.main", run_name="__main__")
except SystemExit:
    pass
"""
    assert not imported(code) & HEAVY


def test_reporting_leaves_tensorboard_and_torch_to_training():
    assert not imported("import dilaff_jax.runtime.reporting") & {"tensorboardX", "torch"}
