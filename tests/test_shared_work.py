"""Refining and fitting, divided among two processes of one run: as by one."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dilaff_jax import train
from dilaff_jax.serving import refine_files
from tests import data_files, running, tiny_run
from tests.test_refine_files import NAMES, SIZES, logits_of, picture, save


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, results and truth of three images, in two folders and of two sizes."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(NAMES):
        data_files.save(picture(SIZES[name], seed), folder / "images" / f"{name}.png")
        save(logits_of(name), folder / "results" / f"{name}.npy")
        truth = np.random.default_rng(seed).integers(0, 3, SIZES[name]).astype(np.uint8)
        truth[:3] = 255
        data_files.save(truth, folder / "truth" / f"{name}.png")
    return folder


def given(files):
    names = {"input": "images", "logits": "results", "truth": "truth"}
    return [f"--{flag}={files / name}" for flag, name in names.items()]


def start(*options, devices=2, **environment):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    return subprocess.Popen(
        [sys.executable, "-m", "dilaff_jax.main", *options],
        cwd=running.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
    )  # fmt: skip


def pair(*options):
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{running.port()}", "JAX_NUM_PROCESSES": "2"}
    return [start(*options, **common, JAX_PROCESS_ID=str(i)) for i in (0, 1)]


def tree(folder):
    """Contents by name; of refinement.json all but where it was made."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    summary = json.loads(found.pop("refinement.json"))
    summary.pop("provenance")
    return found, summary


def test_two_processes_refine_what_one_does(files, tmp_path):
    """The same files and figures; the second has one image, of a size that the first has not."""
    workdir = tiny_run.write(tmp_path / "run")
    options = (f"--workdir={workdir}", "--mode=refine", *given(files), "--propagation=both")
    said = running.finish(start(*options, f"--output={tmp_path / 'alone'}"))
    outputs = [running.finish(p) for p in pair(*options, f"--output={tmp_path / 'together'}")]
    assert "3 images refined" in said
    assert "3 images refined" in outputs[0]
    assert "3 images refined" not in outputs[1], "said once"
    alone, together = tree(tmp_path / "alone"), tree(tmp_path / "together")
    assert len(alone[0]) > 6
    assert together == alone


def test_a_process_without_images_adds_nothing():
    counts = refine_files._nothing(3, True, 2.0)
    assert len(jax.tree.leaves(counts)) > 10
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(counts))


def test_what_one_process_cannot_refine_ends_both(files, tmp_path):
    folder = shutil.copytree(files, tmp_path / "files")
    workdir = tiny_run.write(tmp_path / "run")
    (folder / "results" / "street" / "b.npy").write_bytes(b"no array")
    options = (f"--workdir={workdir}", "--mode=refine", *given(folder))
    outputs = [running.finish(p, 1) for p in pair(*options, f"--output={tmp_path / 'out'}")]
    assert sorted("b.npy" in output for output in outputs) == [False, True]
    assert sorted("another process of this run could not" in o for o in outputs) == [False, True]
    assert not any("Traceback" in output for output in outputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data_dir = data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=7)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = running.make_config(data_dir)
    train.train_and_evaluate(config, workdir)
    return data_dir, workdir


def fitted(workdir, start_all, *options):
    for process in start_all(f"--workdir={workdir}", "--mode=fit", *options):
        running.finish(process)
    content = json.loads((workdir / "refine.json").read_text())
    content.pop("provenance")
    return content


@pytest.mark.parametrize("what", ["split", "files"])
def test_two_processes_fit_what_one_does(what, trained, files, tmp_path):
    data_dir, run = trained
    if what == "split":
        options = ["--config=tests/tiny_config.py", f"--config.data.data_dir={data_dir}"]
    else:
        run, options = tiny_run.write(tmp_path / "run"), given(files)
    options.append("--max_class_loss=0")
    alone, together = (
        fitted(shutil.copytree(run, tmp_path / name), start_all, *options)
        for name, start_all in (("alone", lambda *o: [start(*o, devices=4)]), ("two", pair))
    )
    assert together["images"] == alone["images"] == (7 if what == "split" else 3)
    assert together["bias"] == pytest.approx(alone["bias"], abs=1e-3)
    assert together["before"] == pytest.approx(alone["before"], abs=1e-3)

    assert together["classes"].keys() == alone["classes"].keys()
    for name, of in alone["classes"].items():
        assert together["classes"][name]["plain"] == pytest.approx(of["plain"], abs=1e-3)
    # What each process had of the split is gone with it.
    assert not list((tmp_path / "two").glob("analysis/*process*"))

    def by_options(content):
        return {
            f"{row['operator']} {row['options']}": [row["miou"], row["boundary_f"]]
            for row in content["candidates"]
        }

    one, two = by_options(alone), by_options(together)
    assert len(one) > 10
    assert one.keys() == two.keys()
    for name, figures in one.items():
        assert two[name] == pytest.approx(figures, abs=2e-3), name


def test_fewer_images_than_processes_are_refused(files, tmp_path):
    folder = tmp_path / "files"
    for kind in ("images", "results", "truth"):
        path = next((files / kind).glob("a.*"))
        (folder / kind).mkdir(parents=True)
        shutil.copy(path, folder / kind / path.name)
    workdir = tiny_run.write(tmp_path / "run")
    outputs = [
        running.finish(p, 1) for p in pair(f"--workdir={workdir}", "--mode=fit", *given(folder))
    ]
    assert any("1 images are too few for 2 processes; start one" in output for output in outputs)
    assert not (workdir / "refine.json").exists()
