#!/usr/bin/env bash
# Print the site.yaml of an overlay: where the current cluster's API server is, for the policies that must name it.
# usage: k8s/site.sh RUNS_NAMESPACE > k8s/overlays/OVERLAY/site.yaml
set -euo pipefail
namespace=${1:?usage: k8s/site.sh RUNS_NAMESPACE}

service=$(kubectl get service kubernetes --namespace default --output 'jsonpath={.spec.clusterIP}')
endpoint=$(kubectl get endpointslices --namespace default --selector kubernetes.io/service-name=kubernetes \
  --output 'jsonpath={.items[0].endpoints[0].addresses[0]}')
if [[ -z $service || -z $endpoint ]]; then
  echo "site.sh: the cluster did not say where its API server is (service '$service', endpoint '$endpoint')" >&2
  exit 1
fi

cat <<YAML
# Addresses of this cluster, from k8s/site.sh. Several API servers: widen kubernetesEndpoint to the range they are in.
apiVersion: v1
kind: ConfigMap
metadata:
  name: grpo-site
  annotations:
    config.kubernetes.io/local-config: "true"
data:
  kubernetesService: $service/32
  kubernetesEndpoint: $endpoint/32
  runsNamespace: $namespace
YAML
