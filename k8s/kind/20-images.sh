#!/usr/bin/env bash
# The CPU builds of our images, loaded into the nodes; rollouts use the trainer's image and the transformers engine.
source "$(dirname "$0")/lib.sh"
need kind docker
say "images"
python_base=docker.io/library/python:3.11-slim-bookworm
build_base=docker.io/library/python:3.11-bookworm
cd "$root"
torch=$(grep '^torch==' requirements/torch.txt)
REGISTRY=localhost TAG=kind PUSH=0 BUILDER=docker LOCK="$root/build/kind/lock.json" \
  ARGS_cpu="BASE=$python_base" ARGS_tracking="BASE=$python_base" \
  ARGS_update="BASE=$python_base BUILD_BASE=$build_base TORCH=$torch TORCH_BACKEND=cpu OPS=DS_BUILD_SHM_COMM=1 ACCELERATOR=cpu" \
  scripts/build_images.sh cpu tracking update
kind load docker-image --name "$cluster" \
  localhost/grpo-pipeline-cpu:kind localhost/grpo-pipeline-tracking:kind localhost/grpo-pipeline-update:kind
