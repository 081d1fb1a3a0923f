"""Several processes, of which one dies; and a run that goes on with other devices."""

import shutil
import time

import pytest

from dilaff_jax import train
from tests.reliability import runs
from tests.running import assert_same_numbers, lines, make_config, pair

# Seconds until the other has ended. Without process 0, which keeps JAX's service, it is at once;
# without another one the error is there at once, and the end when the service has missed that one's
# heartbeats for HEARTBEAT seconds. The rest is for slow machines.
HEARTBEAT, BOUND = 20, 900


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "says"),
    [(0, "the leader task was preempted/died"), (1, "Task 1 heartbeat timeout")],
)
def test_a_process_that_dies_ends_the_other_with_an_error_that_says_which(
    dies, says, data_dir, tmp_path, record_property
):
    processes = pair(
        data_dir,
        tmp_path,
        *runs.options(num_steps=100_000, eval_every=100_000, parallel__devices=0),
        f"--config.parallel.heartbeat={HEARTBEAT}",
    )
    try:
        metrics = tmp_path / "metrics.jsonl"
        assert runs.wait_for(
            lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5, processes[0]
        )
        processes[dies].kill()
        died = time.monotonic()
        output, _ = processes[1 - dies].communicate(timeout=BOUND)
        record_property(f"seconds_to_end_without_process_{dies}", round(time.monotonic() - died, 1))
        assert processes[1 - dies].returncode not in (0, 143)
        assert says in output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert runs.steps(tmp_path), "no finished checkpoint is left"


def test_a_run_of_one_device_goes_on_with_four(data_dir, tmp_path):
    """The other way round is in tests/test_train.py."""
    one = tmp_path / "one"
    train.train_and_evaluate(runs.configure(make_config(data_dir), num_steps=6), one)
    four = shutil.copytree(one, tmp_path / "four")
    shutil.rmtree(four / "checkpoints" / "6")
    config = runs.configure(make_config(data_dir), num_steps=6, parallel__devices=4)
    train.train_and_evaluate(config, four)
    assert_same_numbers(lines(four), lines(one))
