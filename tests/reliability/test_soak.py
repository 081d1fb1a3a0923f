"""Long runs leak nothing, and what a run started is gone when it ends."""

import gc
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from dilaff_jax import train
from tests.reliability import runs
from tests.running import finish, make_config, start

STEPS = 2000
# Resident memory is counted in pages, and this process has run other tests, whose memory is given
# back or taken again in jumps of megabytes. So the slope is the median over all pairs of points, and
# the bound 16 MB over the whole run, where a leak of one batch (16 KiB) a step would be 32.
MOST_BYTES_A_STEP = 8192


def resident_bytes():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_2000_steps_leak_no_memory_threads_or_file_handles(
    data_dir, tmp_path, monkeypatch, record_property
):
    config = runs.configure(
        make_config(data_dir),
        num_steps=STEPS, log_every=50, checkpoint_every=250, eval_every=500,
    )  # fmt: skip
    config.loss.affinity = 0.0
    # A first run starts what stays for good: pools of threads, and handles of the data's files.
    train.train_and_evaluate(
        runs.configure(config.copy_and_resolve_references(), num_steps=3), tmp_path / "first"
    )
    handles, threads = runs.files_open(), set(threading.enumerate())
    memory = []
    advance = train.reporting.Reporter.advance

    def measure(self, rows):
        advance(self, rows)
        if self._bar.n % 20 == 0:
            memory.append((self._bar.n, resident_bytes()))

    monkeypatch.setattr(train.reporting.Reporter, "advance", measure)
    train.train_and_evaluate(config, tmp_path / "run")
    half = np.array(memory[len(memory) // 2 :], float)
    slope = scipy.stats.theilslopes(half[:, 1], half[:, 0]).slope
    record_property("steps", STEPS)
    record_property("memory_slope_bytes_per_step", round(float(slope), 1))
    record_property("resident_mebibytes", round(half[-1, 1] / 2**20))
    deadline = time.monotonic() + 60  # pools end their threads in the background
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    record_property("threads_left", len(left))
    # What earlier tests left may be closed meanwhile; what is new is this run's.
    opened = Counter(runs.files_open()) - Counter(handles)
    record_property("file_handles_left", opened.total())
    assert slope < MOST_BYTES_A_STEP
    assert not left
    assert not opened


def ignored_signals_reset():
    """What a shell starts in the background is told to ignore Ctrl-C, and passes that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["exit", "Ctrl-C"])
def test_the_workers_of_the_data_are_gone_with_their_run(ending, data_dir, tmp_path):
    steps = 5 if ending == "exit" else 100_000
    process = start(
        data_dir, tmp_path, *runs.options(num_steps=steps, data__workers=2), devices=1,
        stdout=subprocess.PIPE, start_new_session=True, preexec_fn=ignored_signals_reset,
    )  # fmt: skip
    metrics, workers = tmp_path / "metrics.jsonl", set()

    def running():
        workers.update(runs.children(process.pid))
        return metrics.exists() and metrics.read_bytes().count(b"\n") > 3

    try:
        assert runs.wait_for(running, process)
        assert len(workers) >= 2
        if ending == "Ctrl-C":  # goes to all of the group, as from a terminal
            os.killpg(process.pid, signal.SIGINT)
        output = finish(process, 0 if ending == "exit" else -signal.SIGINT)
        if ending == "Ctrl-C":
            assert "KeyboardInterrupt: what is saved stays, and the same command" in output
            assert "Traceback" not in output
        deadline = time.monotonic() + 60
        while any(map(runs.alive, workers)):
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
