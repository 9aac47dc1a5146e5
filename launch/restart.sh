#!/bin/bash
# Runs a command, and again where another try may help: at most MAX_RESTARTS times (3), RESTART_SECONDS (30) apart.
#
#   bash launch/restart.sh COMMAND [ARGUMENT...]
#
# It ends with the command's exit code. Those of train.py that are not tried again: 0 done; 2 usage, 3 data, 4 diverged,
# which would only come again; 75 preempted and saved, for which the cluster finds a new place; 130 Ctrl-C. All others
# are: 1 unexpected, 134 a peer died, 137 killed. 143, stopped by SIGTERM before there was anything to save, becomes 75.
set -u
restarts=${MAX_RESTARTS:-3}
stopped=no
# The command is sent the signal as well: it saves, and this shell has to be there for its exit code.
trap 'stopped=yes' TERM
while true; do
  "$@"
  code=$?
  case $code in
    0 | 2 | 3 | 4 | 75 | 130) exit "$code" ;;
    143) exit 75 ;;
  esac
  if [[ $stopped == yes ]] || ((restarts <= 0)); then
    exit "$code"
  fi
  echo "restart.sh: exit code $code; restarts left: $restarts" >&2
  restarts=$((restarts - 1))
  sleep "${RESTART_SECONDS:-30}"
done
