# shellcheck shell=bash disable=SC2034 # read by the scripts that source this
# What every step needs: strict mode, the pinned versions, the cluster's name and context.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
set -a
# shellcheck source=../third-party/versions.env
source "$root/k8s/third-party/versions.env"
set +a

cluster=${KIND_CLUSTER:-grpo}
context=kind-$cluster
runs_namespace=kubeflow

say() { printf '\n== %s\n' "$*"; }
fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Every call names the context: a test must never reach another cluster.
k() { kubectl --context "$context" "$@"; }

need() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || fail "needs $tool on the PATH"
  done
}

# Waits until a command succeeds: eventually SECONDS COMMAND...
eventually() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 5
  done
}

wait_for_deployments() {
  local namespace=$1
  k wait deployment --all --namespace "$namespace" --for condition=Available --timeout "${2:-600s}"
}
