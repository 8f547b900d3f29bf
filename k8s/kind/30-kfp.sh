#!/usr/bin/env bash
# Standalone KFP with its SeaweedFS.
source "$(dirname "$0")/lib.sh"
say "KFP $KFP_VERSION"
k apply --kustomize "$root/k8s/third-party/kfp/cluster-scoped"
k wait crd/applications.app.k8s.io --for condition=Established --timeout 60s
k apply --kustomize "$root/k8s/third-party/kfp"
wait_for_deployments kubeflow 900s
