#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, installs on all its hosts, runs, and goes on after preemption.
#
#   bash launch/tpu_vm.sh --name NAME --zone ZONE --type v5litepod-16 --spot --bucket gs://BUCKET/FOLDER \
#     -- --config configs/NAME.py
#
#   --type TYPE       accelerator type: v4-8, v5litepod-16 (v5e), v5p-8, v6e-16, ...
#   --spot            spot capacity; what is preempted is requested again, and the run resumes
#   --bucket gs://B/F where data sets are, F/data, and the run goes, F/runs/NAME; either may be given
#                     after -- by itself (--config.data.data_dir, --workdir)
#   --nfs IP:/SHARE   a Filestore share, mounted on every host at /mnt/shared
#   --setup COMMAND   run on every host before training, such as another mount
#   --runtime NAME    TPU software version; by default the one for JAX on this type
#   --project ID      by default gcloud's
#   --attempts N      give up after N slices or restarts (default 50)
#   --delete          delete the slice after a run that succeeded; without it, it stays and costs
#   --dry-run         print every command and run none
#
# Several hosts need one workdir and data_dir for all, and a spot slice takes its disks with it: keep
# both in a bucket, to which the slice's service account may write, on --nfs, or on what --setup mounts.
# What is committed (HEAD) is what runs. The script must keep running: start it inside tmux, on a small
# VM for long runs. Needs git and the gcloud CLI.
#
# Read for this (2026): cloud.google.com/tpu/docs/queued-resources (create, states, delete), /spot
# (preempted slices are deleted and requested again), /runtimes (versions for JAX),
# /jax-pods (copying to and running on all workers); and
# cloud.google.com/sdk/gcloud/reference/compute/tpus. Types up to v6e; later ones are GKE only: xpk.sh.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,24s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "tpu_vm.sh: $*" >&2; exit 1; }

name='' zone='' type='' runtime='' bucket='' nfs='' setup='' dry_run='' delete='' attempts=50
tier=() where=()
while (($#)); do
  case $1 in
    --name | --zone | --type | --runtime | --bucket | --nfs | --setup | --attempts)
      (($# > 1)) || usage
      printf -v "${1#--}" %s "$2" && shift 2 ;;
    --project) (($# > 1)) || usage; where+=("--project=$2") && shift 2 ;;
    --spot) tier=(--spot) && shift ;;
    --delete) delete=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
done
[[ -n $name && -n $zone && -n $type && $# -gt 0 && $attempts =~ ^[1-9][0-9]*$ ]] || usage
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name $name: want small letters, digits and -"
[[ -z $nfs || $nfs == *:/* ]] || die "--nfs $nfs: want IP:/SHARE"
[[ -z $bucket || $bucket == gs://?* ]] || die "--bucket $bucket: want gs://BUCKET or gs://BUCKET/FOLDER"
where+=("--zone=$zone")
if [[ -z $runtime ]]; then
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--type $type: no runtime known for it; give --runtime, or use launch/xpk.sh" ;;
  esac
fi
if [[ -n $bucket ]]; then
  bucket=${bucket%/}
  [[ " $* " == *" --workdir"[=\ ]* ]] || set -- "$@" "--workdir=$bucket/runs/$name"
  [[ " $* " == *" --config.data.data_dir"[=\ ]* ]] || set -- "$@" "--config.data.data_dir=$bucket/data"
fi
[[ -n $nfs$setup || " $* " == *" --workdir"[=\ ]gs://* ]] ||
  echo "tpu_vm.sh: no --bucket, --nfs or --setup: a workdir on the slice's own disks is lost with it" >&2

# shellcheck source=launch/commands.sh
. "$root/launch/commands.sh"
queue() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all --quiet --command="$1" "${where[@]}"
}

# The state of the request; empty where there is none.
request_state() {
  gcloud compute tpus queued-resources list --filter="name~(^|/)$name\$" \
    --format='value(state.state)' "${where[@]}"
}
vm_state() {
  gcloud compute tpus tpu-vm describe "$name" --format='value(state)' "${where[@]}" 2>/dev/null ||
    echo MISSING
}

create() {
  queue create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
    "${tier[@]}"
}
remove() { queue delete "$name" --force --quiet; }

# Waits for a slice, asking for a new one where the old is gone. A dry run has it at once. What
# cannot be known now, because gcloud fails or a VM is on its way, is asked again later.
obtain() {
  local state asked=''
  if [[ -n $dry_run ]]; then
    create
    return
  fi
  while :; do
    state=$(request_state) || { ((attempt > 1)) || return 1; state=UNKNOWN; }
    case $state in
      ACTIVE)
        case $(vm_state) in
          READY) return ;;
          PREEMPTED | TERMINATED) remove || return 1 ;;
        esac ;;
      '')
        # Right after it was made, a request may not be listed yet.
        [[ -n $asked ]] || create || return 1
        asked=1 ;;
      FAILED | SUSPENDED) remove && asked='' || return 1 ;;
      *) echo "$(date '+%F %T') $name: $state" >&2 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

# The hosts' own Python is too old, so uv brings one; every package is checked against its hash.
# shellcheck disable=SC2016  # expanded on the hosts
unpack='set -e; mkdir -p ~/dilaff_jax; tar -xzf ~/dilaff_jax.tar.gz -C ~/dilaff_jax; cd ~/dilaff_jax
python3 -m pip install --quiet --user "uv<1"; uv=$(python3 -m site --user-base)/bin/uv
[ -x .venv/bin/python ] || $uv venv --quiet --python 3.12 .venv
$uv pip install --quiet --require-hashes -r requirements/tpu.lock'

mount_share="mountpoint -q /mnt/shared || { sudo apt-get -qq -y install nfs-common && \
sudo mkdir -p /mnt/shared && sudo mount $(quoted "$nfs") /mnt/shared && sudo chmod go+rw /mnt/shared; }"

install() {
  local archive
  archive=$(mktemp -d)/dilaff_jax.tar.gz
  [[ -n $dry_run ]] && archive=/tmp/dilaff_jax.tar.gz
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:dilaff_jax.tar.gz" --worker=all --quiet "${where[@]}" &&
    on_all_hosts "$unpack" &&
    { [[ -z $nfs ]] || on_all_hosts "$mount_share"; } &&
    { [[ -z $setup ]] || on_all_hosts "$setup"; }
}

train() {
  # What a lost connection left behind still holds the chips; it saves when told to stop.
  on_all_hosts 'pkill -f "[d]ilaff_jax[.]main" && sleep 30; true'
  on_all_hosts "cd ~/dilaff_jax && exec .venv/bin/python -m dilaff_jax.main $(quoted "$@" --config.parallel.coordinator=auto)"
}

installed=''
for ((attempt = 1; attempt <= attempts; attempt++)); do
  if ! obtain; then
    ((attempt > 1)) || die "the request failed; see above"
    sleep "${POLL_SECONDS:-30}"
    continue
  fi
  if [[ -z $installed ]]; then
    # On a slice that is preempted meanwhile this fails, and is tried again on the next.
    if install; then installed=1; fi
  fi
  status=1
  if [[ -n $installed ]]; then
    status=0
    train "$@" || status=$?
  fi
  if ((status == 0)); then
    if [[ -n $dry_run ]]; then
      echo "# a slice that was preempted is deleted, and all of the above is run again:"
      remove
      exit
    fi
    [[ -n $delete ]] && remove && exit
    echo "done; the slice goes on costing until: $(quoted gcloud compute tpus queued-resources delete "$name" --force "${where[@]}")" >&2
    exit
  fi
  # A preemption takes a moment to be told.
  sleep "${POLL_SECONDS:-30}"
  if [[ $(request_state || true) != ACTIVE || $(vm_state) != READY ]]; then
    echo "$(date '+%F %T') $name was taken away; requesting another" >&2
    installed=''
  elif ((status == 143 || status == 255)); then
    echo "$(date '+%F %T') $name: the run was stopped (status $status); resuming" >&2
  elif [[ -z $installed ]]; then
    die "the installation failed on a slice that is up; see above"
  else
    die "the run failed with status $status on a slice that is up; the slice stays: fix it and start again, or delete it"
  fi
done
die "gave up after $attempts attempts"
