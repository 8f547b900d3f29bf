#!/usr/bin/env bash
# What this repository adds: rights, policies, the training runtime, the janitor, MLflow with its database.
source "$(dirname "$0")/lib.sh"
say "grpo-pipeline"
kubectl config use-context "$context"
k create namespace grpo-tracking --dry-run=client --output yaml | k apply --filename -
"$root/k8s/secrets.sh" "$runs_namespace"
k apply --kustomize "$root/k8s/overlays/kind"
k rollout status statefulset/postgres --namespace grpo-tracking --timeout 300s
k rollout status deployment/mlflow --namespace grpo-tracking --timeout 600s
k get cronjob/grpo-janitor trainingruntime/grpo-update --namespace "$runs_namespace"
