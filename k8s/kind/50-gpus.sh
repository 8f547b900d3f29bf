#!/usr/bin/env bash
# Simulated GPUs on the two pools: the scheduler sees nvidia.com/gpu, no pod gets a device.
source "$(dirname "$0")/lib.sh"
need helm
say "Fake GPU Operator $FAKE_GPU_OPERATOR_VERSION"
helm upgrade --install gpu-operator oci://ghcr.io/run-ai/fake-gpu-operator/fake-gpu-operator \
  --kube-context "$context" --namespace gpu-operator --create-namespace --version "$FAKE_GPU_OPERATOR_VERSION" \
  --values "$root/k8s/kind/fake-gpu-operator.yaml" --wait --timeout 300s

gpus_of_pools() {
  local found
  found=$(k get nodes --selector grpo-pipeline/pool --output 'jsonpath={.items[*].status.allocatable.nvidia\.com/gpu}')
  [[ $found == "2 2" ]]
}
eventually 180 gpus_of_pools || fail "the pools do not show 2 GPUs each: kubectl --context $context describe nodes"
# As on a real pool, only pods that tolerate it come here. After the operator, whose own pods do not.
k taint node --selector grpo-pipeline/pool nvidia.com/gpu=present:NoSchedule --overwrite
