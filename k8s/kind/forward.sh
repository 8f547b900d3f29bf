#!/usr/bin/env bash
# Runs a command with KFP's API on localhost:8888, MLflow on localhost:5000 and SeaweedFS on localhost:9000.
# usage: k8s/kind/forward.sh COMMAND...
source "$(dirname "$0")/lib.sh"
need curl
forwards=()
stop() { kill "${forwards[@]}" 2>/dev/null || true; }
trap stop EXIT

forward() {
  k port-forward --namespace "$1" "service/$2" "$3" >/dev/null &
  forwards+=($!)
}
forward kubeflow ml-pipeline 8888:8888
forward grpo-tracking mlflow 5000:5000
forward kubeflow seaweedfs 9000:9000

answers() { curl --silent --fail --max-time 3 --output /dev/null "$1"; }
eventually 60 answers http://localhost:8888/apis/v2beta1/healthz || fail "KFP does not answer on localhost:8888"
eventually 60 answers http://localhost:5000/health || fail "MLflow does not answer on localhost:5000"
export GRPO_HOST=http://localhost:8888 GRPO_NAMESPACE=$runs_namespace MLFLOW_TRACKING_URI=http://localhost:5000
"$@"
