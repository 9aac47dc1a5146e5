#!/bin/bash
# A run on a Cloud TPU slice of any number of hosts (docs/launch/tpu_vm.md). From the repository's top folder:
#
#   bash launch/tpu_vm.sh create NAME --accelerator-type=TYPE --runtime-version=VERSION [GCLOUD_FLAG...]
#   bash launch/tpu_vm.sh train  NAME --config=FILE --workdir=gs://BUCKET/runs/NAME [FLAG...]
#   bash launch/tpu_vm.sh logs   NAME
#   bash launch/tpu_vm.sh stop   NAME
#   bash launch/tpu_vm.sh delete NAME
#
# The project and the zone are those of `gcloud config set project` and `gcloud config set compute/zone`.
set -euo pipefail

# What each host does with the code of the commit that is checked out here.
readonly INSTALL='set -e
rm -rf gpt2-jax && mkdir gpt2-jax && tar -xzf gpt2-jax.tar.gz -C gpt2-jax && cd gpt2-jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python=3.12
python3 -m uv pip install --quiet ".[tpu]"
sudo systemctl reset-failed gpt2-jax 2> /dev/null || true
'
# systemd outlives the connection, restarts by exit code, and at the end of the machine sends SIGTERM, as stop does:
# 75 preempted and saved: again; 2 usage, 3 data, 4 diverged: never; others: at most 3 times in an hour.
# shellcheck disable=SC2016 # it is the shell of the hosts that expands
readonly START='sudo systemd-run --unit=gpt2-jax --uid="$(id -un)" --working-directory="$PWD" \
  --property=Restart=on-failure --property=RestartSec=30 --property=RestartForceExitStatus=75 \
  --property="RestartPreventExitStatus=2 3 4" --property=SuccessExitStatus=75 \
  --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=4 \
  --property=KillMode=mixed --property=TimeoutStopSec=120 \
  "$PWD/.venv/bin/python" train.py'

queued() { gcloud compute tpus queued-resources "$@"; }

on_workers() { gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

state() { queued describe "$name" --format='value(state.state)' 2> /dev/null || echo NONE; }

delete() { queued delete "$name" --force --quiet; }

# Also after a preemption: what is left of the slice is deleted, and another one is asked for.
create() {
  local found
  found=$(state)
  if [[ $found == SUSPENDED || $found == FAILED ]]; then
    delete
    found=NONE
  fi
  if [[ $found == NONE ]]; then
    queued create "$name" --node-id="$name" "$@"
  fi
  until found=$(state) && [[ $found == ACTIVE ]]; do
    if [[ $found == FAILED || $found == SUSPENDED ]]; then
      echo "tpu_vm.sh: $name is $found: gcloud compute tpus queued-resources describe $name" >&2
      exit 1
    fi
    echo "$name: $found"
    sleep 30
  done
}

train() {
  local flags=''
  scratch=$(mktemp --directory)
  trap 'rm -r "$scratch"' EXIT
  git archive --format=tar.gz --output="$scratch/gpt2-jax.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$scratch/gpt2-jax.tar.gz" "$name:" --worker=all
  if (($#)); then
    # Quoted for the shell of the hosts; systemd takes $$ for $.
    printf -v flags ' %q' "${@//\$/\$\$}"
  fi
  on_workers all "$INSTALL$START$flags"
}

if (($# < 2)); then
  echo 'usage: bash launch/tpu_vm.sh create|train|logs|stop|delete NAME [FLAG...]' >&2
  exit 2
fi
command=$1 name=$2
shift 2
bash "$(dirname "$0")/check_run_name.sh" "$name"
case $command in
  create) create "$@" ;;
  train) train "$@" ;;
  logs) on_workers 0 'sudo journalctl --unit=gpt2-jax --follow --lines=100' ;;
  stop) on_workers all 'sudo systemctl stop gpt2-jax' ;;
  delete) delete ;;
  *)
    echo "tpu_vm.sh: unknown command $command: create, train, logs, stop or delete" >&2
    exit 2
    ;;
esac
