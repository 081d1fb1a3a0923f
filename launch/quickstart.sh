#!/usr/bin/env bash
# From nothing to a result, on a machine that has only Python >= 3.11: installs into .venv, makes the
# data set `shapes`, trains a plain baseline and a network with affinity, and compares them.
# About 6 minutes on two CPU cores after the installation. WORKDIR=DIR says where runs go.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
workdir=${WORKDIR:-workdirs/quickstart}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# shellcheck source=/dev/null
. .venv/bin/activate
echo "installing into .venv ..."
python -m pip install --quiet --upgrade pip
python -m pip install --quiet --editable .
python -m dilaff_jax.data.prepare --dataset shapes --data_dir data
for arm in baseline joint; do
  lambda=$([ "$arm" = baseline ] && echo 0.0 || echo 1.0)
  echo "== $arm: affinity loss $lambda =="
  python -m dilaff_jax.main --config configs/shapes_quickstart.py --workdir "$workdir/$arm" \
    --config.loss.affinity="$lambda"
done
python -m dilaff_jax.report.compare_runs "$workdir/baseline" "$workdir/joint"
