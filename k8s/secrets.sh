#!/usr/bin/env bash
# Create the Secrets of k8s/secrets.template.yaml. One that exists is left as it is, so running this twice is safe.
# usage: k8s/secrets.sh RUNS_NAMESPACE
#   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY   the bucket's keys; without them KFP's own (mlpipeline-minio-artifact)
#   HF_TOKEN                                   optional: for gated models and data sets
set -euo pipefail
namespace=${1:?usage: k8s/secrets.sh RUNS_NAMESPACE}
kfp_namespace=${KFP_NAMESPACE:-kubeflow}

kfp_key() {
  kubectl get secret mlpipeline-minio-artifact --namespace "$kfp_namespace" --output "jsonpath={.data.$1}" | base64 --decode
}

# Values go through a file descriptor, never through arguments that `ps` shows.
create() {
  local namespace=$1 name=$2 values=$3
  if kubectl get secret "$name" --namespace "$namespace" >/dev/null 2>&1; then
    echo "secret/$name in $namespace: kept"
    return
  fi
  kubectl create secret generic "$name" --namespace "$namespace" --from-env-file=<(printf '%s\n' "$values")
}

if [[ -n ${AWS_ACCESS_KEY_ID:-} && -n ${AWS_SECRET_ACCESS_KEY:-} ]]; then
  access=$AWS_ACCESS_KEY_ID secret=$AWS_SECRET_ACCESS_KEY
else
  access=$(kfp_key accesskey) secret=$(kfp_key secretkey)
fi
storage=$(printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s' "$access" "$secret")

create "$namespace" grpo-object-storage "$storage"
create grpo-tracking grpo-tracking-storage "$storage"
# Letters and digits only: the password becomes part of a URL.
create grpo-tracking grpo-tracking-database "password=$(head -c 512 /dev/urandom | LC_ALL=C tr -dc 'A-Za-z0-9' | head -c 32)"
if [[ -n ${HF_TOKEN:-} ]]; then
  create "$namespace" grpo-hub "HF_TOKEN=$HF_TOKEN"
fi
