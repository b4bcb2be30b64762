# Everything that one does with this project. The two that matter: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILD  := build/check
PIP     = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo test slow fuzz lint wheel-test gpu-check clean

help:
	@echo "make demo        install, then the main job on real photos; writes demo-output/report.html"
	@echo "make test        install, then all tests (GPU tests are reported as skipped without a GPU)"
	@echo "make slow        the tests that take minutes and up to 24 GiB: models above 2 GB"
	@echo "make fuzz        five minutes of fuzzing everything that is read from disk"
	@echo "make lint        ruff, and mypy against the built wheel"
	@echo "make wheel-test  the built wheel, used from outside the checkout"
	@echo "make gpu-check   on a machine with a GPU: GPU tests and benchmarks, results as JSON, under 9 minutes"
	@echo "make clean       remove the environment and everything built"

# The environments differ only in the extras that are installed, so `make test` adds to what `make demo` has made.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing (torch is large: some minutes, 6 GB) ..."
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[dev]"
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python -m flowad_fast.benchmarks.demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(ARGS)

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(VENV)/dev.stamp
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds 300 $(ARGS)

# Type checkers do not see the package-dir mapping of an editable install, so mypy reads the unpacked wheel.
$(BUILD)/site: $(VENV)/dev.stamp $(shell git ls-files -- '*.py' pyproject.toml 2>/dev/null)
	@rm -rf $(BUILD) build/lib && mkdir -p $(BUILD)
	$(BIN)/python -m build --wheel --outdir $(BUILD) . >$(BUILD)/build.log 2>&1 || { cat $(BUILD)/build.log; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --target $(BUILD)/site $(BUILD)/*.whl

lint: $(VENV)/dev.stamp $(BUILD)/site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(BUILD)/site && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
	  --python-executable $(abspath $(BIN))/python --cache-dir $(CURDIR)/.mypy_cache -p flowad_fast

wheel-test: $(BUILD)/site
	cd $(BUILD) && PYTHONPATH=$(abspath $(BUILD))/site $(abspath $(BIN))/python $(CURDIR)/tests/wheel_check.py

# Needs no environment of ours: `PYTHON=python3 make gpu-check` runs in any that has torch and this project.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m flowad_fast.benchmarks.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache
