#!/usr/bin/env bash
# Every test against the cluster of up.sh, in order.
source "$(dirname "$0")/lib.sh"
for step in 70-data 71-run 72-recurring 73-cancel; do
  "$root/k8s/kind/forward.sh" "$root/k8s/kind/$step.sh"
done
say "all passed"
