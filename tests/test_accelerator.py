"""benchmarks.accelerator runs from end to end, tiny, on a CPU."""

import json
import subprocess
import sys

from benchmarks import accelerator
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
