"""benchmarks.accelerator runs from end to end, tiny, on a CPU; memory that is freed is kept."""

import json
import subprocess
import sys

import pytest

from benchmarks import accelerator
from dilaff_jax.runtime import allocator
from tests.running import ROOT


def test_the_benchmark_writes_every_result_at_tiny_sizes(tmp_path):
    path = tmp_path / "found"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--smoke", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["left_out"] == []
    assert found["torch"]["card"] == "cpu"
    seconds = found["seconds_to_first_step"]
    assert seconds["compiled before"] < seconds["nothing is cached"]
    parts = [result["what"] for result in found["results"]]
    assert parts == [
        "ceilings",
        "training step",
        "propagation",
        "inference",
        "convolution",
        "convolution",
        "option of the step",
    ]
    by_part = {result["what"]: result["median_seconds"] for result in found["results"]}
    for part in ("training step", "propagation", "inference"):
        assert {"torch eager", "torch.compile"} <= by_part[part].keys()
    assert all(value > 0 for part in by_part.values() for value in part.values())


def test_what_there_is_no_time_for_is_named_and_results_are_there_at_once(tmp_path):
    path = tmp_path / "found"
    report = accelerator.Report(minutes=0.01, calls=2, rounds=3, name=str(path))
    report.measure("something", {"ours": lambda calls: calls / 8})
    assert not report.has_time("something long", 60)
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["results"][0]["seconds"] == {"ours": [0.25] * 3}
    assert found["left_out"][0]["what"] == "something long"


FREED = """
import resource, sys
import numpy as np
from dilaff_jax.runtime import allocator

if sys.argv[1] == "kept":
    assert allocator.keep_memory()
np.ones(2**25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told")
def test_memory_that_is_kept_is_not_fetched_page_by_page_again():
    def faults(how):
        command = [sys.executable, "-c", FREED, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # 128 MB, five times: one fault for each page of 4 kB, or of 2 MB where the system makes those.
    assert faults("kept") < faults("given back") / 4


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_memory()
