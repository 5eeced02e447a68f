# make demo | test | check | bench | bench-generator | image | image-test | clean. Each target makes the .venv it needs.
# PYTHON is the interpreter that .venv is made with; PIP_FLAGS goes to every install, for example
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
SAMPLE := synthseg/samples/colin27_t1.nii.gz
BENCHMARKS ?= $(sort $(wildcard benchmarks/bench_*.py))

.PHONY: help demo test check bench bench-generator image image-test clean

help:
	@echo "make demo    segment the bundled scan into demo/"
	@echo "make test    run the tests                (make test ARGS='-m \"not slow\"')"
	@echo "make check   lint, format, types, import layers"
	@echo "make bench   run benchmarks/bench_*.py    (make bench BENCHMARKS=benchmarks/bench_x.py)"
	@echo "make bench-generator   time the generator against its peers   (ARGS='--template DIR --out FILE.json')"
	@echo "make image   build the container image with docker, podman or buildah   (TORCH=cuda: with CUDA)"
	@echo "make image-test   run the image as docs/container.md says"
	@echo "make clean   remove .venv, demo/, builds and caches"

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp for each set of extras, so that the demo installs the runtime alone.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch .venv/.installed $@

.venv/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[bench]"
	@touch .venv/.installed $@

demo: .venv/.installed
	@mkdir -p demo
	$(BIN)/synthseg segment $(SAMPLE) -o demo/colin27_seg.nii.gz --volumes demo/colin27_volumes.csv \
		--overview demo/colin27_overview.png --overwrite
	@echo
	@cat demo/colin27_volumes.csv
	@echo
	@echo "segmentation  demo/colin27_seg.nii.gz"
	@echo "volumes       demo/colin27_volumes.csv"
	@echo "picture       demo/colin27_overview.png"

test: .venv/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/.installed-bench
	@test -n "$(BENCHMARKS)" || { echo "no benchmarks/bench_*.py here" >&2; exit 2; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

bench-generator: .venv/.installed-bench
	$(BIN)/python benchmarks/bench_generator.py $(ARGS)

# Settings of docs/container.md: ENGINE, IMAGE, TORCH, BASE_IMAGE, BUILD_FLAGS, RUN_FLAGS.
image:
	docker/image.sh build

image-test:
	docker/image.sh test

clean:
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
