#!/usr/bin/env bash
# Starts N processes of one run on this machine, as on N hosts, and ends all if one fails.
#
#   bash launch/local_multiprocess.sh [--dry-run] N -- --config configs/NAME.py --workdir DIR [...]
#
# DEVICES_PER_PROCESS=D gives each process D CPU devices (with JAX_PLATFORMS=cpu). Process 0 prints
# here; process I writes process_I.log into LOG_DIR (default: a new temporary folder). If one fails,
# the others get SIGTERM, and SIGKILL after GRACE_SECONDS (30). --dry-run only prints the commands.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry_run=''
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} == -- ]] || usage
count=$1
shift 2

python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
logs=${LOG_DIR:-}
if [[ -z $dry_run ]]; then
  logs=${logs:-$(mktemp -d)}
  mkdir -p "$logs"
fi
if [[ -n ${DEVICES_PER_PROCESS:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
fi
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count

pids=()
# A request to stop is passed on, so that every process saves before it ends.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  command=("$python" -m dilaff_jax.main "$@")
  if [[ -n $dry_run ]]; then
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i ${command[*]}"
  elif ((i == 0)); then
    JAX_PROCESS_ID=$i "${command[@]}" &
    pids+=($!)
  else
    JAX_PROCESS_ID=$i "${command[@]}" >"$logs/process_$i.log" 2>&1 &
    pids+=($!)
  fi
done
[[ -z $dry_run ]] || exit 0

echo "$count processes, coordinator $JAX_COORDINATOR_ADDRESS, logs of processes 1.. in $logs" >&2
status=0
for ((left = count; left > 0 && status == 0; left--)); do
  wait -n || status=$?
done
if ((status != 0)); then
  kill -TERM "${pids[@]}" 2>/dev/null || true
  for ((second = 0; second < ${GRACE_SECONDS:-30}; second++)); do
    [[ -n $(jobs -pr) ]] || break
    sleep 1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
fi
exit "$status"
