#!/usr/bin/env bash
# Everything a change must pass, on a machine that has only Python >= 3.11: install, lint, contracts
# of imports, types, tests.
# Arguments go to pytest: bash launch/test.sh tests/test_affinity.py -k shift
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# shellcheck source=/dev/null
. .venv/bin/activate
python -m pip install --quiet --upgrade pip
python -m pip install --quiet --editable '.[dev,docs,torch,crf,pretrained,preflight,notebooks,report,huggingface,hub,coco,geo,volumes,wandb,mlflow,gcs,s3]'
# One process may otherwise find a TPU plugin and wait for hardware that is not there.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff format --check .
ruff check .
lint-imports --no-cache
mypy
# Three for two cores: some tests wait for other processes, and one is always in a compiler.
python -m pytest --numprocesses "${TEST_PROCESSES:-3}" --dist loadscope \
  --no-loadscope-reorder "$@"
