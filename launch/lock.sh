#!/usr/bin/env bash
# Writes requirements/{cpu,cuda,tpu}.lock: every package of an installation pinned, with hashes.
#
#   bash launch/lock.sh [--upgrade] [--dry-run]
#
# Pins that still satisfy requirements.txt stay; --upgrade takes the newest. Needs uv (extra `dev`).
# One file serves Python 3.11 and newer. Install: pip install --require-hashes -r requirements/cpu.lock
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run='' upgrade=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --upgrade) upgrade=(--upgrade) ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
  esac
done
for target in cpu cuda tpu; do
  # jax names its CUDA and TPU packages for Linux only; the markers in the locks say so.
  command=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes
    --custom-compile-command 'bash launch/lock.sh' "${upgrade[@]}"
    "requirements/$target.in" --output-file "requirements/$target.lock")
  printf '%q ' "${command[@]}" && echo
  [[ -n $dry_run ]] || "${command[@]}"
done
