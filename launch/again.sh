#!/usr/bin/env bash
# Runs a command, and runs it again when its exit code says that the same command resumes:
#
#   launch/again.sh flexivit train --config configs/digits.py --workdir runs/digits
#
# 75: it was stopped and has saved; 70: it made no progress, or a process was lost; 134: JAX's runtime ended it for that.
# All other codes end this script, too: 2 is a mistake that does not mend itself. SIGTERM and Ctrl-C go to the command,
# and there is no other start after them.
# Variables: RETRIES, other starts at most (100); WAIT, seconds before each (15).
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: $0 COMMAND ARGUMENTS" >&2
  exit 2
fi
pid='' heard='' stopped=''
trap 'heard=1 stopped=1; [[ -z $pid ]] || kill -TERM "$pid" 2> /dev/null' TERM INT

for ((start = 0; ; start++)); do
  "$@" &
  pid=$!
  while true; do # a signal ends the waiting, not the command
    heard=''
    wait "$pid"
    code=$?
    [[ -n $heard ]] || break
  done
  pid=''
  case $code in 70 | 75 | 134) ;; *) exit "$code" ;; esac
  if [[ -n $stopped ]] || ((start >= ${RETRIES:-100})); then
    exit "$code"
  fi
  echo "$0: ended with code $code; again in ${WAIT:-15} s" >&2
  sleep "${WAIT:-15}" &
  wait $!
  [[ -z $stopped ]] || exit "$code"
done
