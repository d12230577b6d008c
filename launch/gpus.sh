#!/usr/bin/env bash
# One machine with several GPUs, one process that drives all of them:
#
#   launch/gpus.sh --config configs/i1k_sup.py --workdir runs/i1k
#   launch/gpus.sh --config configs/i1k_sup.py --workdir runs/i1k --config.mesh.fsdp=8   # weights divided by eight
#   launch/gpus.sh --config configs/i1k_sup.py --workdir s3://BUCKET/runs/i1k            # a run in a bucket: docs/buckets.md
#   COMMAND=doctor launch/gpus.sh --workdir runs/i1k --data configs/i1k_sup.py           # is everything ready?
#
# A run that hangs starts again (launch/again.sh); SIGTERM and Ctrl-C save and end it with code 75, and the same command
# resumes. In a container: docker run --gpus all --shm-size=16g --stop-timeout=120.
# Variables: COMMAND, another one of flexivit; FLEXIVIT, the command itself (.venv/bin/flexivit); CUDA_VISIBLE_DEVICES, the
# GPUs to use (all); FLEXIVIT_CACHE, a folder for downloads and compiled programs; JAX_COMPILATION_CACHE_DIR, a folder or
# bucket for compiled programs alone.
set -euo pipefail

export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" # of each GPU's memory, for JAX
export NCCL_DEBUG=WARN TF_CPP_MIN_LOG_LEVEL=1
ulimit -n "$(ulimit -H -n)" # open files: as many as are allowed

exec "$(dirname "$0")/again.sh" "${FLEXIVIT:-.venv/bin/flexivit}" "${COMMAND:-train}" "$@"
