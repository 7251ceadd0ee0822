# Every target is a few ordinary commands; nothing here is needed to run Headwater by hand.
#   make serve          install what is missing, then serve the default model on 127.0.0.1:8000
#   make test           install what tests need, run all that are not slow
#   make check          lint, types, import contracts, docs
#   make fuzz           10,000 requests that schemathesis makes from the OpenAPI document
#   make audit          known vulnerabilities of what the locks name (needs PyPI's own index)
#   make sanitize       the C kernels over random shapes, watched by ASan and UBSan
#   make bench-kernels  each kernel against what this machine reads and computes at most
PYTHON ?= python3
VENV ?= .venv
# Index of CPU wheels, tried first where no NVIDIA device answers. Empty: only your own pip.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MODEL ?=
ARGS ?=
PYTEST_ARGS ?=
IMAGE ?= headwater:local

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# --no-deps: the locks are complete, and nothing that they name may bring torch in again.
LOCKED := $(PIP) install --quiet --no-deps --require-hashes --requirement
# setuptools warns at length about what an editable install is.
EDITABLE := PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation --editable .
SANITIZE := -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
# Tests of the kernels that import no torch.
SANITIZED := $(addprefix tests/,numerics/test_native_shapes.py numerics/test_native_precision.py \
	numerics/test_native_blocks.py numerics/test_native_draws.py \
	numerics/test_native_bits.py unit/test_native_runner.py unit/test_native_weights.py)
# Tests never ask a model hub.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help audit serve install install-dev test test-long coverage check fuzz sanitize bench-kernels format lock wheel gpu-report image clean

help:
	@sed -n 's/^#   //p' Makefile

serve: $(VENV)/.installed
	$(BIN)/headwater serve $(MODEL) $(ARGS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not gpu" --timeout=1800 $(PYTEST_ARGS)

coverage: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/coverage run -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_docs.py

# ARGS="--real --cases 500" takes the default model in place of the scripted engine.
fuzz: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.run $(ARGS)

# A build of its own in the cache folder, made before the compiler too would run under ASan. Leaks: Python is full of them.
sanitize: $(VENV)/.installed-dev
	CC=$(CC) HEADWATER_KERNEL_FLAGS="$(SANITIZE)" $(BIN)/python -c 'from app.runner.native import build, levels; \
	here = levels.LEVELS.index(levels.choose_level()); print(*map(build.find_or_build, levels.LEVELS[here:]), sep="\n")'
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 CC=$(CC) HEADWATER_KERNEL_FLAGS="$(SANITIZE)" \
	$(PYTEST) -m "slow or not slow" --timeout=1800 $(SANITIZED) $(PYTEST_ARGS)

bench-kernels: $(VENV)/.installed
	$(BIN)/python -m loadtest.bench_kernels $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# ARGS=--upgrade takes newer releases; without it only what pyproject.toml asks for changes.
lock: $(VENV)/.installed-dev
	$(BIN)/python scripts/lock.py $(ARGS)

# With the compiled kernels inside, for this platform. HEADWATER_PLATFORM_TAG names an older C library than this.
wheel: $(VENV)/.installed-dev
	test "$$(uname -m)" != x86_64 || $(BIN)/python -c 'from app.runner.native import build; build.main()'
	rm -rf build
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

# In an environment of its own: it is no part of what is developed or served.
audit:
	test -d build/audit || $(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --disable-pip --require-hashes -r requirements/base.txt -r requirements/dev.txt

# Needs an NVIDIA device, about 10 minutes, 20 GB of disk and no network; writes docs/gpu/<card>.json.
# ARGS=--dry-run walks through it on the CPU.
gpu-report: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/gpu/report.py $(ARGS)

image:
	docker build --tag $(IMAGE) $(ARGS) .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# Stamps: a second `make serve` installs nothing. Each is made anew when what it was made from changes.
$(VENV)/.created: requirements/pip.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headwater needs Python 3.11 or newer; make PYTHON=python3.12 ... names another")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(LOCKED) requirements/pip.txt
	@touch $@

$(VENV)/.torch: scripts/install_torch.py | $(VENV)/.created
	$(BIN)/python scripts/install_torch.py --index "$(TORCH_INDEX)"
	@touch $@

$(VENV)/.installed: requirements/torch.txt pyproject.toml setup.py $(VENV)/.created $(VENV)/.torch
	$(LOCKED) requirements/torch.txt
	$(EDITABLE)
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	$(LOCKED) requirements/dev.txt
	@touch $@
