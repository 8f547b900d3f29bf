# `make demo` and `make test` set up what they need; a second call installs nothing.
SHELL := bash
VENV := .venv
VLLM := .venv-vllm
PYTHON ?= python3
TORCH ?= cpu
export PYTHON TORCH REGISTRY TAG

.PHONY: help demo test lint docs images kind-up kind-test kind-down clean
help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: requirements/tools.txt requirements/torch.txt requirements/local.txt requirements/test.txt pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV) requirements/local.txt requirements/test.txt

$(VLLM)/.installed: requirements/tools.txt requirements/torch.txt requirements/rollout.txt pyproject.toml scripts/install.sh
	scripts/install.sh $(VLLM) requirements/rollout.txt

$(VENV)/.system: $(VENV)/.installed scripts/system.sh scripts/ceph_rgw.py
	scripts/system.sh $(VENV)/bin/python
	touch $@

demo: $(VENV)/.installed ## A real GRPO run here: a tiny model learns arithmetic, in minutes
	$(VENV)/bin/python recipes/arithmetic/prepare.py
	$(VENV)/bin/grpo run recipes/arithmetic/settings.toml

test: $(VENV)/.system $(VLLM)/.installed ## All tests that need neither GPU nor cluster
	$(VENV)/bin/ruff check .
	GRPO_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed ## Style and mistakes
	$(VENV)/bin/ruff check .

docs: $(VENV)/.installed ## Generate docs/configuration.md and the picture of the pipeline
	$(VENV)/bin/python -m pipeline.reference

images: ## Build the images: make images REGISTRY=registry.example/team TAG=v1
	scripts/build_images.sh

kind-up: ## A kind cluster with Kubeflow, storage, MLflow, Trainer and simulated GPUs
	k8s/kind/up.sh

kind-test: $(VENV)/.installed ## The arithmetic recipe on that cluster
	k8s/kind/test.sh

kind-down: ## Remove the cluster
	k8s/kind/down.sh

clean: ## Remove environments and runs
	rm -rf $(VENV) $(VLLM) runs build recipes/*/build
