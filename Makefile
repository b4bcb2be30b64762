# Everything that one does with this project. The two that matter: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILD  := build/check
LIGHT  := build/light
GPU_ENV = build/gpu
JOBS   ?= 2
PIP     = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo line-demo test quick slow fuzz lint wheel-test docs release gpu-check clean

help:
	@echo "make demo        install, then the main job on real photos; writes demo-output/report.html"
	@echo "make line-demo   a whole line on this computer for a minute: cameras, broker, OPC UA, outcomes (docs/line.md)"
	@echo "make test        install, then all tests (GPU tests are reported as skipped without a GPU)"
	@echo "make quick       the tests that take less than a minute together"
	@echo "make slow        the tests that take minutes and up to 24 GiB: models above 2 GB"
	@echo "make fuzz        five minutes of fuzzing everything that is read from disk"
	@echo "make lint        ruff and mypy"
	@echo "make wheel-test  the built wheel outside the checkout: with everything, and in an environment without torch"
	@echo "make docs        the documentation pages"
	@echo "make release     everything that a release needs, and what to type then; publishes nothing"
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

$(VENV)/line.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[demo,line]"
	@touch $@

line-demo: $(VENV)/line.stamp
	$(BIN)/python -m flowad_fast.benchmarks.demo.line_demo $(ARGS)

# One thread per process: two processes of one thread do more than one of two.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

quick: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not long" $(ARGS)

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(VENV)/dev.stamp
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds 300 $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p flowad_fast

# The wheel, unpacked in site/, the source distribution beside it, and what the light environment is compared with.
$(BUILD)/stamp: $(VENV)/dev.stamp $(shell git ls-files -- '*.py' '*.j2' pyproject.toml 2>/dev/null)
	@rm -rf $(BUILD) build/lib && mkdir -p $(BUILD)
	$(BIN)/python -m build --outdir $(BUILD) . >$(BUILD)/build.log 2>&1 || { cat $(BUILD)/build.log; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --target $(BUILD)/site $(BUILD)/*.whl
	@touch $@

# What `pip install flowad-fast` installs, with the pinned versions; the wheel itself is put in anew each time.
$(LIGHT)/stamp: pyproject.toml constraints.txt $(BUILD)/stamp
	@test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet --constraint constraints.txt $(BUILD)/*.whl
	$(LIGHT)/bin/python -m pip install --quiet --no-deps --force-reinstall $(BUILD)/*.whl
	@touch $@

wheel-test: $(BUILD)/stamp $(LIGHT)/stamp
	cd $(BUILD) && PYTHONPATH=$(abspath $(BUILD))/site $(abspath $(BIN))/python $(CURDIR)/tests/wheel_check.py full
	cd $(BUILD) && $(abspath $(LIGHT))/bin/python $(CURDIR)/tests/wheel_check.py light

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/build.py $(ARGS)

release: $(VENV)/dev.stamp
	@test -z "$$(git status --porcelain)" || { echo "there are uncommitted changes; commit them first" >&2; exit 1; }
	@$(BIN)/python tests/wheel_check.py ready
	@$(MAKE) lint wheel-test test
	@rm -rf dist && mkdir dist && cp $(BUILD)/*.whl $(BUILD)/*.tar.gz dist
	@$(BIN)/python tests/wheel_check.py release

# Needs no environment of ours and no package index: any Python that has torch, and for what it lacks a folder of wheels.
#   make gpu-check [PYTHON=python3] [WHEELS=folder] [OUTPUT=folder] [ARGS=...]
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) benchmarks/preflight.py $(if $(WHEELS),--wheels "$(WHEELS)") --environment $(GPU_ENV)
	$(GPU_ENV)/bin/python -m flowad_fast.benchmarks.gpu_check $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

clean:
	rm -rf $(VENV) build dist demo-output line-demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache
