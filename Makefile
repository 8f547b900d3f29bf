# `make demo` and `make test` set up what they need; a second call installs nothing.
SHELL := bash
VENV := .venv
VLLM := .venv-vllm
PYTHON ?= python3
TORCH ?= cpu
export PYTHON TORCH

.PHONY: help demo test lint docs clean
help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: requirements/torch.txt requirements/local.txt requirements/test.txt pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV) requirements/local.txt requirements/test.txt

$(VLLM)/.installed: requirements/torch.txt requirements/rollout.txt pyproject.toml scripts/install.sh
	scripts/install.sh $(VLLM) requirements/rollout.txt

demo: $(VENV)/.installed ## A real GRPO run here: a tiny model learns arithmetic, in minutes
	$(VENV)/bin/python recipes/arithmetic/prepare.py
	$(VENV)/bin/grpo run recipes/arithmetic/settings.toml

test: $(VENV)/.installed $(VLLM)/.installed ## All tests
	$(VENV)/bin/ruff check .
	GRPO_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(VENV)/bin/python -m pytest

lint: $(VENV)/.installed ## Style and mistakes
	$(VENV)/bin/ruff check .

docs: $(VENV)/.installed ## Generate docs/configuration.md and the picture of the pipeline
	$(VENV)/bin/python -m pipeline.reference

clean: ## Remove environments and runs
	rm -rf $(VENV) $(VLLM) runs build recipes/*/build
