#!/usr/bin/env bash
# One whole run: it must end well, name a champion in the store and leave a run in MLflow.
source "$(dirname "$0")/test-lib.sh"
say "a run"
name=kind-run-$(date +%s)
settings "$name"
"$grpo" submit "$recipe" --wait "${set_arguments[@]}"

"$python" - "$name" <<'PYTHON'
import sys
from components.common.store import open_store
from components.common.champion import read
champion = read(open_store("s3://mlpipeline/grpo-kind/store?endpoint=http://localhost:9000&region=us-east-1"), sys.argv[1])
assert champion is not None, f"{sys.argv[1]} has no champion"
print("champion:", champion)
PYTHON

experiment=$(curl --silent --fail --get --data-urlencode "experiment_name=$name" \
  "$MLFLOW_TRACKING_URI/api/2.0/mlflow/experiments/get-by-name" | jq --raw-output .experiment.experiment_id)
runs=$(curl --silent --fail --json "{\"experiment_ids\": [\"$experiment\"]}" "$MLFLOW_TRACKING_URI/api/2.0/mlflow/runs/search")
jq --exit-status '.runs | length > 0 and any(.[]; .data.metrics | any(.key == "reward"))' <<<"$runs" >/dev/null ||
  fail "MLflow has no run with the metric reward in experiment $name: $runs"
