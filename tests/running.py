"""Whole runs of `tests/tiny_config.py`, in this process or in one of their own, and what they left."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dilaff_jax.runtime import reporting
from tests import conftest, progress, tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[1]


def make_config(data_dir, **changes):
    config = tiny_config.get_config()
    config.data.data_dir = str(data_dir)
    config.update(changes)
    return config


def command(data_dir, workdir, *options):
    return [
        sys.executable, "-m", "dilaff_jax.main", "--config=tests/tiny_config.py",
        f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", *options,
    ]  # fmt: skip


def start(data_dir, workdir, *options, devices=4, environment=(), **settings):
    """A process of its own, as a user starts it; `settings` are those of `Popen`."""
    workdir.mkdir(exist_ok=True)
    if not (workdir / "compilation_cache").exists():
        conftest.COMPILED.mkdir(parents=True, exist_ok=True)
        (workdir / "compilation_cache").symlink_to(conftest.COMPILED)
    # Compiled as in this process, see conftest.
    flag = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | settings
    return subprocess.Popen(
        command(data_dir, workdir, *options),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag, **dict(environment)},
        **settings,
    )


def finish(process, code=0):
    output = progress.output(process)
    assert process.returncode == code, output
    return output


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pair(data_dir, workdir, *options, **settings):
    """Two processes of two devices each, that are one run."""
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port()}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(
            data_dir, workdir, *options, devices=2,
            environment={**common, "JAX_PROCESS_ID": str(i)}, **settings,
        )
        for i in (0, 1)
    ]  # fmt: skip


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir, at):
    """All arrays of a checkpoint, read without the project's code."""
    tree = ocp.StandardCheckpointer().restore(
        (workdir / "checkpoints" / str(at) / "state").resolve()
    )
    return {
        jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_bit_identical(a, b, at=6):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    first, second = saved(a, at), saved(b, at)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    results = [(d / "evaluation" / str(at) / "results.json").read_bytes() for d in (a, b)]
    assert results[0] == results[1]


def assert_same_numbers(found, expected):
    """Lines of metrics.jsonl that agree but for rounding."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            # Figures of few pixels jump where one of them changes class by rounding.
            tolerance = 1e-5 if "loss" in key or "norm" in key else 2e-3
            assert a[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


class Killed(BaseException):
    """Ends a run as a kill does: without any chance to save."""


@contextlib.contextmanager
def killed_after(monkeypatch, step):
    """A run within this process ends after so many steps."""
    advance = reporting.Reporter.advance

    def die(self, rows):
        advance(self, rows)
        if self._bar.n == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(reporting.Reporter, "advance", die)
        with pytest.raises(Killed):
            yield
