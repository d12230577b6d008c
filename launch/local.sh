#!/usr/bin/env bash
# Several processes on this machine, as on several hosts. For trying things; one process drives all devices as well.
#
#   launch/local.sh 2 --config configs/digits.py --workdir runs/two
#
# Each line is marked with its process. SIGTERM or Ctrl-C goes to all: they save the same step and end with code 75.
# Variables: COMMAND, another one of flexivit: eval, predict, embed, flexify, doctor; FLEXIVIT, the command itself
# (.venv/bin/flexivit); PORT, of the first process (default: a free one);
# XLA_FLAGS=--xla_force_host_platform_device_count=4 gives each process four devices on a CPU;
# with GPUs, GPUS_EACH=4 gives each process four of them.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES ARGUMENTS-OF-flexivit-train" >&2
  exit 2
fi
count=$1
shift
command=${FLEXIVIT:-.venv/bin/flexivit}
free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$(python3 -c "$free")}

pids=()
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  if [[ -n ${GPUS_EACH:-} ]]; then
    CUDA_VISIBLE_DEVICES=$(seq -s, $((i * GPUS_EACH)) $(((i + 1) * GPUS_EACH - 1)))
    export CUDA_VISIBLE_DEVICES
  fi
  "$command" "${COMMAND:-train}" --coordinator_address "127.0.0.1:$port" --num_processes "$count" --process_id "$i" "$@" \
    2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=("$!")
done

code=0
for pid in "${pids[@]}"; do
  while true; do # a signal ends the waiting, not the process
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2> /dev/null || break
  done
  ((status > code)) && code=$status
done
exit "$code"
