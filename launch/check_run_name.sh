#!/bin/bash
# Refuses, with exit code 2, what cannot name a run: names reach shells, folders, buckets and Kubernetes.
#
#   bash launch/check_run_name.sh NAME
#
# The pattern is that of a Kubernetes service (RFC 1035), cut to 40 so that pods can add their numbers to it.
set -u
LC_ALL=C # elsewhere [a-z] can hold capitals
name=${1-}
if [[ ! $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]]; then
  printf 'run name %q: use 1 to 40 of a-z, 0-9 and -, the first a letter, the last no -\n' "$name" >&2
  exit 2
fi
