#!/usr/bin/env bash
# All steps in order; each may be run again by itself.
source "$(dirname "$0")/lib.sh"
for step in 10-cluster 20-images 30-kfp 40-trainer 50-gpus 60-grpo; do
  "$root/k8s/kind/$step.sh"
done
say "ready: make kind-test"
