"""The launch scripts: what they would run, what they do when things go wrong, and the pinned packages."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement

from tests import running

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
RUN = ["--config", "configs/shapes_quickstart.py", "--workdir", "/mnt/shared/a run"]
TPU = ["--name", "r1", "--zone", "us-west4-a", "--type", "v5litepod-16"]


def call(script, *arguments, env=None, check=True):
    """Runs a script with Bash, in the repository's root; returns its result with text output."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=dict(os.environ) | (env or {}),
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )


def dry_run(script, *arguments, **options):
    """The commands that a dry run prints, each split into its arguments."""
    text = call(script, "--dry-run", *arguments, **options).stdout
    return [shlex.split(re.sub(r"\$'", "'", line)) for line in text.splitlines() if line[0] != "#"]


def fakes(tmp_path, **programs):
    """Environment in which `programs` are Bash scripts that also write their calls to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"sleep": ":", **programs}.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "T": str(tmp_path)}


def calls(tmp_path, pattern=""):
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line for line in lines if re.search(pattern, line)]


def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(scripts) >= 8
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sbatch", "local_multiprocess.sh"])
def test_a_script_without_arguments_says_how_it_is_used(script):
    result = call(script, check=False)
    assert result.returncode == 2
    assert f"launch/{script}" in result.stderr
    assert "set -euo" not in result.stderr
    assert "#" not in result.stderr.replace("#SBATCH", "")


# Cloud TPU


def test_a_tpu_slice_is_requested_installed_and_run_in_this_order():
    create, archive, copy, unpack, mount, clear, train, delete = dry_run(
        "tpu_vm.sh", *TPU, "--spot", "--project", "p", "--nfs", "10.0.0.2:/share", "--", *RUN
    )
    where = ["--project=p", "--zone=us-west4-a"]
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "r1", "--node-id=r1"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
        *where,
    ]
    assert archive[:1] + archive[3:5] == ["git", "archive", "--format=tar.gz"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert "--worker=all" in copy
    assert copy[6] == "r1:dilaff_jax.tar.gz"
    for command in (unpack, mount, clear, train):
        assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "r1", "--worker=all"]
        assert command[-2:] == where
    assert "--require-hashes -r requirements/tpu.lock" in " ".join(unpack)
    assert "sudo mount 10.0.0.2:/share /mnt/shared" in " ".join(mount)
    assert "a run" in train[8]
    assert shlex.split(train[8].removeprefix("--command="))[-1] == (
        "--config.parallel.coordinator=auto"
    )
    assert delete[4:] == ["delete", "r1", "--force", "--quiet", *where]


@pytest.mark.parametrize("bucket", ["gs://b", "gs://b/folder/"])
def test_a_bucket_is_where_data_and_run_are_unless_they_are_given(bucket):
    said = call("tpu_vm.sh", "--dry-run", *TPU, "--bucket", bucket, "--", "--config", "c.py")
    assert "is lost with it" not in said.stderr
    train = dry_run("tpu_vm.sh", *TPU, "--bucket", bucket, "--", "--config", "c.py")[-2]
    run = shlex.split(train[-2].removeprefix("--command="))
    root = bucket.rstrip("/")
    assert f"--workdir={root}/runs/r1" in run
    assert f"--config.data.data_dir={root}/data" in run
    own = ("--workdir", "gs://c/w", "--config.data.data_dir=gs://c/d")
    train = dry_run("tpu_vm.sh", *TPU, "--bucket", bucket, "--", "--config", "c.py", *own)[-2]
    run = shlex.split(train[-2].removeprefix("--command="))
    assert [a for a in run if root in a] == []
    assert call("tpu_vm.sh", *TPU, "--bucket", "b", "--", *RUN, check=False).returncode == 1


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_every_tpu_type_gets_its_runtime(type_, runtime):
    create = dry_run("tpu_vm.sh", *TPU[:4], "--type", type_, "--", *RUN)[0]
    assert f"--runtime-version={runtime}" in create


def test_an_unknown_tpu_type_is_refused():
    result = call("tpu_vm.sh", *TPU[:4], "--type", "tpu7x-8", "--", *RUN, check=False)
    assert result.returncode == 1
    assert "no runtime known" in result.stderr


# A cloud: the request is in $T/request, training takes its results from $T/results and the VM its
# state from $T/vms while there are any, one a line.
GCLOUD = r"""
case "$*" in
  *"queued-resources create"*) echo ACTIVE >"$T/request" ;;
  *"queued-resources delete"*) rm "$T/request" ;;
  *"queued-resources list"*) [[ ! -e "$T/broken" ]] || exit 1
    cat "$T/request" 2>/dev/null ;;
  *"tpu-vm describe"*)
    if [[ -s "$T/vms" ]]; then
      sed -n 1p "$T/vms" && sed -i 1d "$T/vms"
    else
      [[ $(cat "$T/request") == ACTIVE ]] && echo READY || echo PREEMPTED
    fi ;;
  *dilaff_jax.main*)
    read -r state status <"$T/results"
    sed -i 1d "$T/results"
    echo "$state" >"$T/request"
    exit "$status" ;;
esac
exit 0
"""


def cloud(tmp_path, *results):
    env = fakes(tmp_path, gcloud=GCLOUD)
    (tmp_path / "results").write_text("".join(f"{r}\n" for r in results))
    return env


def test_a_preempted_slice_is_deleted_requested_installed_again_and_the_run_goes_on(tmp_path):
    env = cloud(tmp_path, "SUSPENDED 255", "ACTIVE 0")
    result = call("tpu_vm.sh", *TPU, "--spot", "--", *RUN, env=env)
    requests = [line.split()[4] for line in calls(tmp_path, "resources (create|delete)")]
    assert requests == ["create", "delete", "create"]
    assert len(calls(tmp_path, "dilaff_jax.main --config")) == 2
    assert len(calls(tmp_path, "tpu-vm scp")) == 2
    assert "taken away" in result.stderr
    assert "goes on costing" in result.stderr


def test_a_stopped_run_resumes_on_the_same_slice(tmp_path):
    env = cloud(tmp_path, "ACTIVE 143", "ACTIVE 0")
    call("tpu_vm.sh", *TPU, "--delete", "--", *RUN, env=env)
    assert len(calls(tmp_path, "dilaff_jax.main --config")) == 2
    assert len(calls(tmp_path, "tpu-vm scp")) == 1
    assert len(calls(tmp_path, "resources delete")) == 1


def test_a_slice_that_is_still_starting_is_waited_for_and_not_deleted(tmp_path):
    env = cloud(tmp_path, "ACTIVE 0")
    (tmp_path / "vms").write_text("CREATING\nSTARTING\n")
    call("tpu_vm.sh", *TPU, "--", *RUN, env=env)
    assert len(calls(tmp_path, "tpu-vm describe")) == 3
    assert not calls(tmp_path, "resources delete")


def test_a_request_that_cannot_be_made_ends_at_once(tmp_path):
    env = cloud(tmp_path)
    (tmp_path / "broken").touch()
    result = call("tpu_vm.sh", *TPU, "--", *RUN, env=env, check=False)
    assert result.returncode == 1
    assert "the request failed" in result.stderr
    assert len(calls(tmp_path, "gcloud")) == 1


def test_a_run_that_fails_on_a_sound_slice_ends_and_is_not_repeated(tmp_path):
    env = cloud(tmp_path, "ACTIVE 1")
    result = call("tpu_vm.sh", *TPU, "--", *RUN, env=env, check=False)
    assert result.returncode == 1
    assert "failed with status 1" in result.stderr
    assert len(calls(tmp_path, "dilaff_jax.main --config")) == 1
    assert not calls(tmp_path, "resources delete")


# GKE


def test_xpk_builds_pushes_and_submits_with_restarts():
    cluster, build, push, submit = dry_run(
        "xpk.sh",
        *("--cluster", "c", "--name", "r1", "--type", "v5litepod-16", "--slices", "2"),
        *("--image", "r/p/i", "--storage", "share", "--spot", "--create-cluster", "--", *RUN),
    )
    assert cluster[:3] == ["xpk", "cluster", "create"]
    assert "--spot" in cluster
    assert {"--build-arg=ACCELERATOR=tpu", "--build-arg=RUN_AS=0"} <= set(build)
    tag = push[2]
    assert re.fullmatch(r"r/p/i:[0-9a-f]{12}", tag)
    assert f"--tag={tag}" in build
    assert submit[:3] == ["xpk", "workload", "create"]
    wanted = {
        *("--cluster=c", "--workload=r1", "--tpu-type=v5litepod-16", "--num-slices=2"),
        *(f"--docker-image={tag}", "--max-restarts=50", "--storage=share"),
    }
    assert wanted <= set(submit)
    command = shlex.split(submit[-1].removeprefix("--command="))
    assert command == [
        *("exec", "python", "-m", "dilaff_jax.main", *RUN, "--config.parallel.coordinator=auto")
    ]


def test_xpk_takes_gpus_by_device_type():
    build, _, submit = dry_run(
        *("xpk.sh", "--cluster", "c", "--name", "r1", "--type", "h100-80gb-8"),
        *("--image", "r/p/i", "--", *RUN),
    )
    assert "--build-arg=ACCELERATOR=cuda" in build
    assert {"--device-type=h100-80gb-8", "--num-nodes=1"} <= set(submit)


def test_the_nodes_of_an_xpk_gpu_workload_find_each_other_by_what_it_sets():
    # As get_env_container of XPK's core/docker_resources.py has it: no port in the address.
    program = """
        import jax
        from dilaff_jax.runtime import parallel
        parallel.initialize("auto")
        print(jax.process_index(), "of", jax.process_count())
    """
    common = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1", "JAX_COORDINATOR_PORT": str(running.port())}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=ROOT,
            env={**os.environ, **common, "NNODES": "2", "NODE_RANK": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    said = [node.communicate(timeout=120)[0].strip() for node in nodes]
    assert said == ["0 of 2", "1 of 2"]


# SLURM


def test_slurm_gives_a_process_all_gpus_of_its_node():
    variable, command, requeue = dry_run("slurm.sbatch", *RUN, env={"SLURM_GPUS_ON_NODE": "4"})
    assert variable == ["JAX_LOCAL_DEVICE_IDS=0,1,2,3"]
    assert command[0] == "srun"
    assert command[-7:] == ["-m", "dilaff_jax.main", *RUN, "--config.parallel.coordinator=auto"]
    assert requeue == ["scontrol", "requeue", "JOB"]


def test_slurm_says_how_it_is_submitted_where_no_job_runs_it():
    refused = call("slurm.sbatch", *RUN, check=False)
    assert refused.returncode == 2
    assert "submit it: sbatch launch/slurm.sbatch --config" in refused.stderr


def test_slurm_gives_each_of_several_processes_the_gpu_that_jax_picks():
    env = {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}
    assert dry_run("slurm.sbatch", *RUN, env=env)[0] == ["JAX_LOCAL_DEVICE_IDS="]
    refused = call("slurm.sbatch", *RUN, env=env | {"SLURM_NTASKS_PER_NODE": "3"}, check=False)
    assert refused.returncode == 2
    assert "3 processes and 4 GPUs" in refused.stderr


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(143, "RUNNING", 1), (143, "COMPLETING", 0), (1, "RUNNING", 0), (0, "RUNNING", 0)],
)
def test_slurm_requeues_what_was_stopped_and_neither_failed_nor_cancelled(
    tmp_path, status, state, requeued
):
    env = fakes(tmp_path, srun=f"exit {status}", squeue=f"echo {state}", scontrol="") | {
        "SLURM_JOB_ID": "7"
    }
    assert call("slurm.sbatch", *RUN, env=env, check=False).returncode == status
    assert len(calls(tmp_path, "scontrol requeue 7")) == requeued


# One machine


def test_local_processes_share_a_coordinator_and_differ_in_their_index():
    env = {"PORT": "1234"}
    lines = dry_run("local_multiprocess.sh", "2", "--", *RUN[:2], env=env)
    assert [line[:3] for line in lines] == [
        ["JAX_COORDINATOR_ADDRESS=127.0.0.1:1234", "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={i}"]
        for i in range(2)
    ]


# Containers and packages


def test_all_that_the_image_copies_is_in_its_context_and_little_more():
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY")]
    copied = {name for names in copied for name in names}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    sent = {line[1:] for line in ignore if line.startswith("!")}
    assert {name.replace("${ACCELERATOR}", "*") for name in copied} == sent
    assert all(list(ROOT.glob(name)) for name in sent)
    lines = dockerfile.splitlines()
    user = next(i for i, line in enumerate(lines) if line.startswith("USER"))
    assert lines[user - 1 : user + 1] == ["ARG RUN_AS=1000", "USER ${RUN_AS}"]  # not root
    assert lines[user + 1].startswith("ENTRYPOINT")


def locked(target):
    """{name: [(version, marker)]} of a lock file; asserts that everything has a hash."""
    text = (ROOT / "requirements" / f"{target}.lock").read_text()
    found = {}
    for entry in re.split(r"\n(?=[a-z0-9])", text):
        if "==" not in entry.splitlines()[0]:
            continue
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
        requirement = Requirement(entry.splitlines()[0].removesuffix("\\").strip())
        found.setdefault(requirement.name, []).append(requirement)
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_the_locked_packages_are_those_that_are_required(target):
    found = locked(target)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        wanted = Requirement(line)
        pins = found[wanted.name.lower().replace("_", "-")]
        for pin in pins:
            version = next(iter(pin.specifier)).version
            assert version in wanted.specifier, f"{line}: run launch/lock.sh"
    python = {"python_full_version": "3.12.1", "sys_platform": "linux"}
    jax = [p for p in found["jax"] if p.marker is None or p.marker.evaluate(python)]
    assert len(jax) == 1
    accelerator = {"cpu": set(), "cuda": {"jax-cuda13-plugin"}, "tpu": {"libtpu"}}[target]
    assert {n for n in found if n in ("libtpu", "jax-cuda13-plugin")} == accelerator


def test_the_licences_of_all_locked_packages_are_allowed():
    bin_ = pathlib.Path(sys.executable).parent
    result = call("audit.sh", "--licences", env={"PATH": f"{bin_}:{os.environ['PATH']}"})
    assert re.search(r"^ jax\b.*Apache", result.stdout, re.M)


def test_the_audit_reads_every_lock():
    commands = dry_run("audit.sh")
    audited = [c[-1] for c in commands if c[0] == "pip-audit"]
    assert audited == [f"requirements/{t}.lock" for t in ("cpu", "cuda", "tpu")]


def test_locks_are_written_for_every_target_with_hashes():
    commands = dry_run("lock.sh")
    assert [c[-1] for c in commands] == [f"requirements/{t}.lock" for t in ("cpu", "cuda", "tpu")]
    assert all({"--generate-hashes", "--universal"} <= set(c) for c in commands)
