#!/bin/bash
# Starts a run on Kubernetes (docs/launch/gke.md): a JobSet from one of the files beside this one, under the run's name.
#
#   bash launch/jobset.sh NAME FILE [KUBECTL_CREATE_FLAG...]
set -euo pipefail
here=$(dirname "$0")
if (($# < 2)); then
  echo "usage: bash launch/jobset.sh NAME FILE [KUBECTL_CREATE_FLAG...]" >&2
  exit 2
fi
name=$1 file=$2
bash "$here/check_run_name.sh" "$name"
if ! grep -q '^  name: RUN-NAME$' "$file"; then
  printf 'jobset.sh: %q has no line "  name: RUN-NAME"\n' "$file" >&2
  exit 2
fi
# The name was checked: it holds nothing that sed would read as more than text.
sed "s/^  name: RUN-NAME\$/  name: $name/" "$file" | kubectl create -f - "${@:3}"
