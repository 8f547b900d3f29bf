#!/usr/bin/env bash
# Kubeflow Trainer and JobSet, for updates on several nodes.
source "$(dirname "$0")/lib.sh"
say "Trainer $TRAINER_VERSION"
k apply --server-side --kustomize "$root/k8s/third-party/trainer"
k wait crd/trainjobs.trainer.kubeflow.org crd/jobsets.jobset.x-k8s.io --for condition=Established --timeout 60s
wait_for_deployments kubeflow-system
