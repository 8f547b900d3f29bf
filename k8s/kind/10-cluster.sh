#!/usr/bin/env bash
# The cluster itself, of the pinned Kubernetes.
source "$(dirname "$0")/lib.sh"
need kind kubectl
say "cluster $cluster, Kubernetes $KUBERNETES_VERSION"
if kind get clusters | grep -qx "$cluster"; then
  echo "exists"
else
  kind create cluster --name "$cluster" --config "$root/k8s/kind/cluster.yaml" \
    --image "docker.io/kindest/node:$KUBERNETES_VERSION" --wait 180s
fi
k get nodes
