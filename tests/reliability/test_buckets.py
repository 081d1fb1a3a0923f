"""Runs in buckets, of both protocols: killed, cut off, on other machines, in two processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dilaff_jax.storage import bucket, mirror
from tests import buckets, conftest, running, tiny_run
from tests.reliability import runs

LAST = runs.OPTIONS["num_steps"]
# Machines are copies in folders of their own: who comes to one that the last did not die on waits
# for the lease.
MACHINES = 2


@pytest.fixture(scope="module", params=["gs", "s3"])
def served(request):
    with buckets.serving(request.param) as found:
        yield found


@pytest.fixture
def place(served, monkeypatch, request):
    with buckets.own_place(served, request.node.nodeid, monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    """A run on a disk, from start to end."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    process = running.start(data_dir, workdir, *runs.options(), devices=1)
    running.finish(process)
    return workdir


def start(data_dir, address, machine, *options, config="tiny_config", devices=1, environment=()):
    """A process of its own; a machine is a folder for copies."""
    conftest.COMPILED.mkdir(parents=True, exist_ok=True)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    own = {
        "DILAFF_JAX_CACHE": str(machine),
        "JAX_COMPILATION_CACHE_DIR": str(conftest.COMPILED),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    return subprocess.Popen(
        [
            sys.executable, "-m", "tests.in_bucket", f"--config=tests/{config}.py",
            f"--workdir={address}", f"--config.data.data_dir={data_dir}", *options,
        ],
        cwd=running.ROOT, env={**os.environ, **own, **dict(environment)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def fetched(address, tmp_path, monkeypatch):
    """What is in the bucket, on a machine that has nothing of it."""
    monkeypatch.setenv("DILAFF_JAX_CACHE", str(tmp_path / "looking"))
    return mirror.local(address, "--workdir")


def steps_there(address):
    """The steps of the whole checkpoints in the bucket."""
    names = (re.match(r"checkpoints/(\d+)/_CHECK", n) for n in bucket.Bucket(address).list())
    return [int(m[1]) for m in names if m]


@pytest.mark.slow
def test_a_run_with_its_data_in_a_bucket_is_the_same(
    place, data_dir, unbroken, tmp_path, monkeypatch
):
    """The data set is brought there, the run reads it and ends as on a disk; eval and predict too."""
    address, _ = place
    monkeypatch.setenv("DILAFF_JAX_CACHE", str(tmp_path / "preparing"))
    with mirror.written(f"{address}/data/shapes/tiny", "data", alone=True, kind="read") as folder:
        subprocess.run(["cp", "-r", *(data_dir / "shapes/tiny").iterdir(), folder], check=True)
    data, run = f"{address}/data", f"{address}/run"
    running.finish(start(data, run, tmp_path / "one", *runs.options()))
    running.assert_bit_identical(unbroken, fetched(run, tmp_path, monkeypatch), LAST)

    output = running.finish(start(data, run, tmp_path / "two", "--mode=eval", *runs.options()))
    assert f"step {LAST}" in output
    results = bucket.Bucket(run).read(f"evaluation/{LAST}/results.json")
    assert results == (unbroken / "evaluation" / str(LAST) / "results.json").read_bytes()
    export = subprocess.run(
        [sys.executable, "-m", "dilaff_jax.export", run, str(tmp_path / "model.stablehlo")],
        cwd=running.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert export.returncode == 0, export.stderr
    files = ("--input=tests/images", f"--output={address}/out", "--propagation=both")
    running.finish(start(data, run, tmp_path / "three", "--mode=predict", *files))
    names = bucket.Bucket(f"{address}/out").list()
    assert sum(name.startswith("labels/") for name in names) == 4


def reach(process, run, before, rng):
    """Waits for a moment, by chance; False if the run ended before."""
    if rng.random() < 1 / 3:
        until = time.monotonic() + rng.uniform(1, 5)
        return runs.wait_for(lambda: time.monotonic() > until, process)
    return runs.wait_for(lambda: (steps_there(run) or [0])[-1] > before, process)


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_kills(
    kills, place, data_dir, unbroken, tmp_path, monkeypatch, record_property
):
    """SIGKILL at any moment; the next start is on the same machine or on another."""
    address, _ = place
    rng, survived, ended, machine, process = random.Random(kills.start), 0, 0, 0, None
    run = f"{address}/0"
    try:
        while survived < len(kills):
            process = start(data_dir, run, tmp_path / str(machine), *runs.options())
            wanted = steps_there(run)[-1:] or [0]
            if not reach(process, run, wanted[0], rng):
                running.finish(process)
                running.assert_bit_identical(unbroken, fetched(run, tmp_path, monkeypatch), LAST)
                ended += 1
                run = f"{address}/{ended}"
                continue
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            survived += 1
            machine = rng.randrange(MACHINES)
        running.finish(start(data_dir, run, tmp_path / str(machine), *runs.options()))
        running.assert_bit_identical(unbroken, fetched(run, tmp_path, monkeypatch), LAST)
        assert steps_there(run), "checkpoints are there"
    finally:
        if process is not None:
            process.kill()
        record_property("kills_tried", len(kills))
        record_property("kills_survived", survived)
        record_property("runs_finished_bit_identical", ended + 1)


@pytest.mark.slow
def test_a_run_goes_on_through_an_outage(
    place, data_dir, unbroken, tmp_path, monkeypatch, record_property
):
    """Errors, then answers that end in the middle, then slow ones, while it trains."""
    address, faults = place
    process = start(data_dir, address, tmp_path / "one", *runs.options())
    assert runs.wait_for(lambda: steps_there(address), process)
    faults.status = 503
    threading.Event().wait(6)
    faults.status, faults.cut, faults.delay, faults.lost = 0, 3, 0.05, 3
    output = running.finish(process)
    running.assert_bit_identical(unbroken, fetched(address, tmp_path, monkeypatch), LAST)
    assert "Traceback" not in output
    record_property("seconds_without_bucket", 6)


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_in_one_sentence_and_nothing_is_lost(
    place, data_dir, unbroken, tmp_path, monkeypatch
):
    address, faults = place
    process = start(
        data_dir, address, tmp_path / "one", *runs.options(), environment={"PATIENCE": "3"}
    )
    assert runs.wait_for(lambda: steps_there(address), process)
    faults.status = 503
    output = running.finish(process, 1)
    assert re.search(r"failed for \d+ s .*All of it is in .*brings it there", output), output
    assert "Traceback" not in output
    faults.status = 0
    running.finish(start(data_dir, address, tmp_path / "one", *runs.options()))
    running.assert_bit_identical(unbroken, fetched(address, tmp_path, monkeypatch), LAST)


@pytest.mark.slow
def test_two_machines_do_not_train_in_one_folder_and_a_stopped_one_is_succeeded(
    place, data_dir, unbroken, tmp_path, monkeypatch
):
    address, faults = place
    faults.delay = 0.5  # a line that takes a checkpoint for longer than the run keeps it
    one = start(data_dir, address, tmp_path / "one", *runs.options(num_steps=100_000))
    assert runs.wait_for(lambda: steps_there(address), one)
    faults.delay = 0
    output = running.finish(start(data_dir, address, tmp_path / "two", *runs.options()), 1)
    assert re.search(r"Taken: .*works there; wait for it, or use another folder", output), output
    one.send_signal(signal.SIGTERM)
    output = running.finish(one, 143)
    at = int(re.search(r"step (\d+) is saved", output).group(1))
    assert at in steps_there(address), "what is saved last is there when it ends"


@pytest.mark.slow
def test_machines_share_an_ablation_and_one_that_dies_is_succeeded(
    place, data_dir, tmp_path, monkeypatch
):
    """As on a disk, run by run: what the killed one had not come to the end of is gone on with."""
    address, _ = place
    options = ("--mode=ablate", *runs.options(num_steps=6, eval_every=6))
    disk = tmp_path / "disk"
    disk.mkdir()
    running.finish(start(data_dir, disk, tmp_path / "none", *options, config="tiny_ablation"))

    def machine(name):
        return start(data_dir, address, tmp_path / name, *options, config="tiny_ablation")

    one, two = machine("one"), machine("two")
    there = bucket.Bucket(address)

    def begun():
        return {n.partition("/.lease")[0] for n in there.list() if "/.lease/" in n}

    assert runs.wait_for(lambda: len(begun()) >= 2, one)
    one.kill()
    one.communicate()
    running.finish(two)
    output = running.finish(machine("one"))
    assert output.count(": trained ==") == 3, output
    found = fetched(address, tmp_path, monkeypatch)
    for run in ("baseline/seed-3", "joint/seed-3", "aaf/seed-3"):
        running.assert_bit_identical(disk / run, found / run, 6)
    expected, ablation = (json.loads((d / "ablation.json").read_text()) for d in (disk, found))
    for key in ("variants", "differences", "selection", "per_image"):
        assert ablation[key] == expected[key], key


def assert_same(disk, there):
    """To the bit: what lies on several devices is told by its digest."""
    for name in ("metrics.jsonl", f"evaluation/{LAST}/results.json"):
        assert (disk / name).read_bytes() == (there / name).read_bytes(), name
    digests = [
        json.loads((d / f"checkpoints/{LAST}/data/metadata").read_text()) for d in (disk, there)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]["digest"]) > 50


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_as_two_on_a_disk(place, data_dir, tmp_path, monkeypatch):
    """Each has a copy of its own; process 0 writes what both hold, and both go on from it."""
    address, _ = place
    mode = "fsdp" if address.startswith("gs") else "pmap"
    options = (*runs.options(parallel__devices=0), f"--config.parallel.mode={mode}")

    def pair(*options):
        common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{running.port()}"}
        common |= {"JAX_NUM_PROCESSES": "2"}
        processes = [
            start(
                data_dir, address, tmp_path / f"machine-{i}", *options, devices=2,
                environment={**common, "JAX_PROCESS_ID": str(i)},
            )
            for i in (0, 1)
        ]  # fmt: skip
        for process in processes:
            running.finish(process)

    disk = tmp_path / "disk"
    for process in running.pair(data_dir, disk, *options):
        running.finish(process)
    pair(*options)
    assert_same(disk, fetched(address, tmp_path, monkeypatch))
    bucket.Bucket(address).remove(
        n for n in bucket.Bucket(address).list() if n.startswith(f"checkpoints/{LAST}/")
    )
    pair(*options)  # from the one before, on both
    assert_same(disk, fetched(address, tmp_path, monkeypatch))


@pytest.mark.slow
def test_two_processes_predict_together_what_one_does(place, tmp_path):
    """Each a share of the files, into one bucket."""
    address, _ = place
    workdir = tiny_run.write(tmp_path / "run")
    files = ("--mode=predict", "--input=tests/images")
    one = [sys.executable, "-m", "tests.in_bucket", f"--workdir={workdir}", *files]
    alone = [*one, f"--output={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=running.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    common = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{running.port()}"}
    processes = [
        subprocess.Popen(
            [*one, f"--output={address}/out"], cwd=running.ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={
                **os.environ, **common, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i),
                "DILAFF_JAX_CACHE": str(tmp_path / f"machine-{i}"),
            },
        )
        for i in (0, 1)
    ]  # fmt: skip
    outputs = [running.finish(process) for process in processes]
    assert all("2 images segmented" in output for output in outputs)
    there = bucket.Bucket(f"{address}/out")
    expected = {
        p.relative_to(tmp_path / "alone").as_posix(): p.read_bytes()
        for p in (tmp_path / "alone").rglob("*")
        if p.is_file()
    }
    assert {name: there.read(name) for name in there.list()} == expected
