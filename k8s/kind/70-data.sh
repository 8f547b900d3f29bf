#!/usr/bin/env bash
# The recipe's tiny model and its problems, made here and put into the cluster's bucket.
source "$(dirname "$0")/test-lib.sh"
say "data"
mkdir -p "$(dirname "$overrides_file")"
"$python" "$root/recipes/arithmetic/prepare.py"
AWS_ENDPOINT_URL_S3=http://localhost:9000 POD_ENDPOINT=http://seaweedfs.kubeflow:9000 \
  "$python" "$root/k8s/kind/upload.py" "$recipe" s3://mlpipeline/grpo-kind >"$overrides_file"
cat "$overrides_file"
