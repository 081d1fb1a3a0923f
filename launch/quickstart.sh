#!/usr/bin/env bash
# From nothing to a result, on a machine that has only Python >= 3.11: installs into .venv, makes the
# data set `shapes`, trains a plain baseline and a network with affinity, compares them, draws a
# picture. About 5 minutes on two CPU cores after the installation. WORKDIR=DIR says where runs go,
# SEED=N with which seed they begin.
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
    --config.loss.affinity="$lambda" --config.seed="${SEED:-0}"
done
python -m dilaff_jax.report.compare_runs "$workdir/baseline" "$workdir/joint" \
  --picture "$workdir/result.png"
echo "Next, your own images: one folder of images, one of masks, as docs/datasets.md says, then" \
  "'python -m dilaff_jax.data.prepare --dataset image_folder --name mine --source FOLDER'" \
  "and the same training with '--config.data.dataset=image_folder/mine'."
echo "picture: $workdir/result.png"
