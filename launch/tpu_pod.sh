#!/usr/bin/env bash
# A TPU VM pod, one process a host, by gcloud:
#
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh create v5litepod-32
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh doctor --workdir gs://BUCKET/runs/i1k --data configs/i1k_sup.py
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh train --config configs/i1k_sup.py --workdir gs://BUCKET/runs/i1k
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh log       # the first host's log; Ctrl-C ends only the display
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh stop      # SIGTERM: all save the same step
#   NAME=flexivit ZONE=us-central1-a launch/tpu_pod.sh delete
#
# The hosts find each other by the TPU's own metadata. The run and the data (--config.input.data.data_dir=gs://...) are in a
# bucket, which the hosts' service account may read and write, or on a file system that all hosts see (Filestore:
# NFS=10.0.0.2:/share, then /shared/runs/i1k). The same `train` resumes from the last checkpoint. It does not need this
# terminal, and each host writes flexivit.log in its home. What ends with code 70, 75 or 134 starts again (again.sh).
# Several slices (a queued resource of several nodes) are NAME=NODE-0, NODE-1, ...: the same command for each of them; use
# --config.mesh.fsdp=CHIPS of a slice.
# Variables: NAME, ZONE, NFS; RUNTIME, the image of the hosts; PYTHON, which uv installs there (3.12); CACHE, a folder or
# bucket for compiled programs (gs://BUCKET/compiled; default: each host's own folder); PACKAGES, further ones to install.
set -euo pipefail

: "${NAME:?is the name of the pod}" "${ZONE:?is its zone}"
root=$(cd "$(dirname "$0")/.." && pwd)

cache=''
[[ -z ${CACHE:-} ]] || cache="JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$CACHE") "

everywhere() { # runs a command on each host
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${WORKER:-all}" --command="$1"
}

case ${1:-} in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="${2:?is the kind of the pod}" \
      --version="${RUNTIME:-v2-alpha-tpuv5-lite}"
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    tar -C "$root" --exclude=.git --exclude=.venv* --exclude=.*_cache --exclude=runs -czf "$packed/flexivit.tgz" .
    gcloud compute tpus tpu-vm scp "$packed/flexivit.tgz" "$NAME:" --zone="$ZONE" --worker=all
    everywhere "mkdir -p flexivit && tar -C flexivit -xzf flexivit.tgz"
    # The images have an older Python than this project needs.
    everywhere "python3 -m pip install -q --user uv && uv=\$HOME/.local/bin/uv && \$uv venv -q --python ${PYTHON:-3.12} .venv &&
      \$uv pip install -q --python .venv 'jax[tpu]' './flexivit[gcs]' ${PACKAGES:-}"
    if [[ -n ${NFS:-} ]]; then
      everywhere "sudo apt-get -qq install nfs-common && sudo mkdir -p /shared && sudo mount -o rw,hard '$NFS' /shared"
    fi
    ;;
  train)
    shift
    # LIBTPU_INIT_ARGS takes XLA's flags.
    everywhere "cd flexivit && TF_CPP_MIN_LOG_LEVEL=1 ${cache}nohup setsid launch/again.sh ../.venv/bin/flexivit train \
      $(printf '%q ' "$@") >> ~/flexivit.log 2>&1 < /dev/null &"
    ;;
  doctor)
    shift
    everywhere "cd flexivit && TF_CPP_MIN_LOG_LEVEL=1 ${cache}../.venv/bin/flexivit doctor $(printf '%q ' "$@")"
    ;;
  log) WORKER=0 everywhere "tail -n 50 -F flexivit.log" ;;
  stop) everywhere "pkill -TERM -f '[l]aunch/again.sh'" ;; # no other start after it; not the shell that says this
  delete) gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet ;;
  *)
    echo "usage: NAME=... ZONE=... $0 create KIND | doctor ARGUMENTS | train ARGUMENTS | log | stop | delete" >&2
    exit 2
    ;;
esac
