#!/usr/bin/env bash
# Fetch the custom resource definitions of the pinned releases, for tests/k8s/test_k8s_schema.py.
# usage: k8s/crds.sh FOLDER; GRPO_CRD_DIR=FOLDER make test
set -euo pipefail
folder=${1:?usage: k8s/crds.sh FOLDER}
folder=$(realpath --canonicalize-missing "$folder")
cd "$(dirname "$0")"
source third-party/versions.env
mkdir -p "$folder"
fetch() { curl --silent --show-error --fail --location --output "$folder/$1" "$2"; }

fetch kueue.yaml "https://github.com/kubernetes-sigs/kueue/releases/download/$KUEUE_VERSION/manifests.yaml"
for kind in trainjobs trainingruntimes; do
  fetch "trainer-$kind.yaml" \
    "https://raw.githubusercontent.com/kubeflow/trainer/$TRAINER_VERSION/manifests/base/crds/trainer.kubeflow.org_$kind.yaml"
done
fetch poddefaults.yaml \
  "https://raw.githubusercontent.com/kubeflow/dashboard/$DASHBOARD_VERSION/components/poddefaults-webhooks/manifests/kustomize/base/crd.yaml"
ls "$folder"
