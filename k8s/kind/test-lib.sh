# shellcheck shell=bash disable=SC2034 # read by the scripts that source this
# What the tests share: the recipe, its settings for this cluster, and questions to KFP. Runs inside forward.sh.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
: "${GRPO_HOST:?run this through k8s/kind/forward.sh}"
need jq curl
recipe=$root/recipes/arithmetic/settings.toml
overrides_file=$root/build/kind/overrides
grpo=${GRPO:-$root/.venv/bin/grpo}
python=${GRPO_PYTHON:-$root/.venv/bin/python}

# The bucket's keys, for what these scripts read and write from here.
secret() {
  k get secret mlpipeline-minio-artifact --namespace kubeflow --output "jsonpath={.data.$1}" | base64 --decode
}
AWS_ACCESS_KEY_ID=$(secret accesskey)
AWS_SECRET_ACCESS_KEY=$(secret secretkey)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY

# The recipe's settings as this cluster needs them, as --set arguments: settings FINE_TUNE [NAME=VALUE]...
settings() {
  local line
  set_arguments=(--set "fine_tune=$1" --set rollout.engine=transformers
    --set "tracking.uri=http://mlflow.grpo-tracking:5000" --set "tracking.experiment=$1"
    --set "cluster.rollout.image=localhost/grpo-pipeline-update:kind"
    --set "cluster.update.image=localhost/grpo-pipeline-update:kind")
  local stage
  for stage in configure dataset reward evaluate publish; do
    set_arguments+=(--set "cluster.$stage.image=localhost/grpo-pipeline-cpu:kind")
  done
  for stage in rollout update; do
    set_arguments+=(--set "cluster.$stage.node_selector={\"grpo-pipeline/pool\" = \"$stage\"}"
      --set "cluster.$stage.cpu=\"1\"" --set "cluster.$stage.memory=3Gi" --set "cluster.$stage.shm=1Gi")
  done
  shift
  while read -r line; do set_arguments+=(--set "$line"); done <"$overrides_file"
  for line in "$@"; do set_arguments+=(--set "$line"); done
}

kfp() { curl --silent --show-error --fail --max-time 30 "$GRPO_HOST/apis/v2beta1/$1"; }

# Runs of a fine-tune, newest first, one JSON object a line. By experiment: a schedule names its runs as it likes.
runs_of() {
  local experiment
  experiment=$(kfp 'experiments?page_size=200' |
    jq --raw-output --arg name "grpo-$1" '.experiments[]? | select(.display_name == $name).experiment_id')
  [[ -z $experiment ]] ||
    kfp "runs?page_size=100&sort_by=created_at%20desc&experiment_id=$experiment" | jq --compact-output '.runs[]?'
}

stage_pods() {
  k get pods --namespace "$runs_namespace" --selector app.kubernetes.io/part-of=grpo-pipeline,app.kubernetes.io/component \
    --field-selector status.phase!=Succeeded,status.phase!=Failed --output name
}
