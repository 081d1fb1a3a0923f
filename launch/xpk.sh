#!/usr/bin/env bash
# Trains on GKE with XPK: builds and pushes the image, submits the workload, restarts it if preempted.
#
#   bash launch/xpk.sh --cluster NAME --name RUN --type v5litepod-16 --image REGION-docker.pkg.dev/P/R/dilaff \
#     --storage SHARE -- --config configs/NAME.py --workdir /mnt/shared/runs/NAME [...]
#
#   --type TYPE       TPU type as XPK names it (v5litepod-16, v6e-16, ...); h100-80gb-8 and the like: GPUs
#   --slices N        slices of this type (default 1)
#   --image NAME      where the image is pushed; its tag is the commit
#   --storage NAME    an XPK storage (`xpk storage --help`) for workdir and data; may be given again
#   --create-cluster  make the cluster first;   --spot: of spot capacity
#   --project ID, --zone ZONE   by default gcloud's
#   --restarts N      how often the workload may be restarted (default 50)
#   --dry-run         print every command and run none
#
# A preempted process saves its state and exits with 143; XPK restarts what exits with 42 or 127-255,
# and the run resumes from its workdir, which must lie on a storage that all hosts see.
# Needs pip install 'xpk>=1,<2', gcloud, kubectl and docker. Options as of `xpk workload create --help`,
# XPK 1.16; guide: github.com/AI-Hypercomputer/xpk
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,19s/^# \{0,1\}//p' "$0" >&2; exit 2; }

cluster='' name='' type='' image='' slices=1 restarts=50 create='' dry_run=''
where=() storage=() tier=()
while (($#)); do
  case $1 in
    --cluster | --name | --type | --image | --slices | --restarts)
      (($# > 1)) || usage
      printf -v "${1#--}" %s "$2" && shift 2 ;;
    --project | --zone) (($# > 1)) || usage; where+=("$1=$2") && shift 2 ;;
    --storage) (($# > 1)) || usage; storage+=("--storage=$2") && shift 2 ;;
    --create-cluster) create=1 && shift ;;
    --spot) tier=(--spot) && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
done
[[ -n $cluster && -n $name && -n $type && -n $image && $# -gt 0 ]] || usage
[[ $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]] || usage

# TPU types are v4-8, v5litepod-16, v5p-8, v6e-16, tpu7x-...; other names are GPUs, counted in nodes.
# The device files of a TPU belong to root.
case $type in
  v[0-9]* | tpu*) accelerator=tpu user=0 device=(--tpu-type="$type" --num-slices="$slices") ;;
  *) accelerator=cuda user=1000 device=(--device-type="$type" --num-nodes="$slices") ;;
esac
# shellcheck source=launch/commands.sh
. "$root/launch/commands.sh"

tag=$image:$(git -C "$root" rev-parse --short=12 HEAD)
[[ -z $create ]] || run xpk cluster create --cluster="$cluster" "${device[@]}" "${tier[@]}" "${where[@]}"
run docker build --file="$root/launch/Dockerfile" --build-arg="ACCELERATOR=$accelerator" \
  --build-arg="RUN_AS=$user" --tag="$tag" "$root"
run docker push "$tag"
# exec, so that the signal that XPK passes on reaches Python and not a shell around it.
run xpk workload create --cluster="$cluster" --workload="$name" "${device[@]}" --docker-image="$tag" \
  --max-restarts="$restarts" --termination-grace-period-seconds=120 "${storage[@]}" "${where[@]}" \
  --command="exec python -m dilaff_jax.main $(quoted "$@" --config.parallel.coordinator=auto)"
