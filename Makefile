# Everything runs in .venv, which `make setup` creates and every other target brings up to date first.
# Needs python3 (3.10 or newer) and make; with g++ the C++ kernels are built as well.

PYTHON ?= python3
# What pip is asked for, read when .venv is created. For another build of torch:
#   make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# Installed beside a build of torch that brings no Triton.
TRITON ?= 3.8.0
# Passed on to the command of `make test` and `make bench`: make test ARGS='-k write -x'
ARGS ?=

# `make gpu SYSTEM=1` runs in $(PYTHON) itself, with the packages that it has.
SYSTEM ?=

# What `make study` trains on.
DATA ?= mnist

# How long `make fuzz` runs.
SECONDS ?= 60

# Ways to run the tests of the GPU kernels without a GPU; tests/gpu/conftest.py says what each proves.
RUNGS ?= simt interpreter ttsem aot

# How many processes run the tests; a process takes about 1 GiB.
PARALLEL ?= -n auto --maxprocesses 8

VENV := .venv
BIN := $(VENV)/bin
# What pip may not change in .venv: torch, and the Triton that torch brought.
PINS := $(VENV)/pins.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS)
SOURCES := $(shell find csrc -type f)
FORMATTED := $(SOURCES) $(wildcard benchmarks/kernels/*.cpp tests/*.cpp tests/compilers/*.h tests/compilers/*.cpp tests/simt/*.h tests/simt/*.cpp tests/simt/*.cu)

.PHONY: help setup wheel empty-root matrix bench bench-full bench-compare sweep serving train demo study gpu kernels test test-kernels fuzz cases arm compilers mutants lint format docs readme clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo "Variables: TORCH='$(TORCH)' PYTHON='$(PYTHON)' ARGS='$(ARGS)'"

setup: $(VENV)/.installed ## create .venv with the package, its C++ kernels and all tools

bench: setup ## real images through every backend: checks, timings, a picture
	$(BIN)/python -m fastkm bench $(ARGS)

bench-full: setup $(VENV)/.peers ## every form in PyTorch and other packages beside the kernels, ceilings, promises; 8 to 25 minutes
	$(BIN)/python -m benchmarks.suite $(ARGS)

bench-compare: setup ## the kernels of another revision beside these: make bench-compare BASE=main
	$(BIN)/python -m benchmarks.compare $(or $(BASE),$(error name the other revision: make bench-compare BASE=main)) $(ARGS)

sweep: setup ## every shape from K = 4 to 4,096 beside the best form in PyTorch, tables and a heat map; long, can be stopped and goes on
	$(BIN)/python -m benchmarks.sweep $(ARGS)

serving: setup ## one memory that answers queries while patterns are written: latencies, and a picture; 2 minutes
	$(BIN)/python -m benchmarks.serving $(ARGS)

train: setup ## train the generative model of examples/dkm on MNIST; can be killed and resumed with ARGS=--resume
	$(BIN)/python -m examples.dkm.train $(ARGS)

demo: setup ## held-out images stored, corrupted and cleaned up by that model, in three pictures
	$(BIN)/python -m examples.dkm.demo $(ARGS)

study: setup ## train the generative model on DATA='mnist PATH ...' and print every figure about it; an hour
	$(BIN)/python -m examples.dkm.study --data $(DATA) $(ARGS)
	$(BIN)/python tools/update_readme.py --study

gpu: $(if $(SYSTEM),,setup) ## on a machine with a GPU: build, checks, timings, tests, sanitizer; SYSTEM=1 takes the Python that is there and installs nothing
	$(if $(SYSTEM),$(PYTHON),$(BIN)/python) -m benchmarks.gpu $(ARGS)

kernels: setup ## what every GPU kernel compiles to, into docs/results/kernels.md; needs nvcc, minutes
	$(BIN)/python tools/kernel_table.py
	$(BIN)/python tools/sequence_table.py

test: setup ## the tests of the package, in as many processes as there are processors
	$(BIN)/python -m pytest $(PARALLEL) --dist loadfile $(ARGS)

test-kernels: setup ## the tests of the GPU kernels, once for each way of running them without a GPU
	for rung in $(RUNGS); do $(BIN)/python -m pytest $(PARALLEL) --kernels=$$rung $(ARGS) tests/gpu tests/simt || exit 1; done

fuzz: setup ## random problems against float64, held to the literal loop's own error: make fuzz SECONDS=60; ARGS='--seed 1 --problems 100000'
	PYTHONPATH=tests $(BIN)/python -m fuzz $(if $(findstring --problems,$(ARGS)),,--seconds $(SECONDS)) $(ARGS)

cases: setup ## situations that users reported, of the API, the commands and installing; SLOW=1 builds the extension as well
	$(BIN)/python -m tests.reported.cases
	bash tests/reported/cases.sh

arm: setup ## the CPU kernels for aarch64 under an emulator; needs g++-aarch64-linux-gnu and qemu-user; three minutes
	PYTHONPATH=tests $(BIN)/python -m compilers --whole aarch64-linux-gnu-g++

compilers: setup ## the CPU kernels as g++ 11 and clang build them, at every level; a compiler that is not there is left out
	PYTHONPATH=tests $(BIN)/python -m compilers

mutants: setup ## plant small faults one by one, each of which the tests must catch; ten to thirty minutes, and less when repeated
	PYTHONPATH=tests $(BIN)/python -m mutants $(ARGS)

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))

format: setup ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

docs: setup $(VENV)/.docs ## the documentation, into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'fastkm: open docs/_build/html/index.html'

readme: bench ## measure what the front page and docs/results/benchmark.md show, and write them; 10 minutes
	$(BIN)/python -m benchmarks.suite --families update_posterior write read --presets M --batch 16 \
		--dtypes float32 --sections groups --output results/front
	$(BIN)/python tools/update_readme.py

wheel: setup ## wheels for any Linux, audited and tried in an empty environment, into dist; ARGS=cpu for one of them
	$(BIN)/python tools/wheel.py --torch '$(TORCH)' $(ARGS)

empty-root: ## the wheel in an empty Debian 12 without a compiler; needs root, debootstrap and WHEELS=folder with torch's wheel
	tools/empty_root.sh $(ARGS)

matrix: ## build and test with other torches, Pythons and compilers, into docs/results/matrix.md; hours without ARGS='--python ...'
	$(PYTHON) tools/matrix.py $(ARGS)

clean: ## remove what was built; the next target builds it again
	rm -rf build dist docs/_build *.egg-info fastkm/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# Torch comes first and from $(TORCH), so that what depends on it takes the build that is there.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastkm needs Python 3.10 or newer, this is %s; name one with make PYTHON=..." % sys.version)'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(BIN)/python tools/bootstrap_pip.py; fi
	@echo 'fastkm: installing $(TORCH)'
	@$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES) $(wildcard build_support/*.py)
	@echo 'fastkm: installing the tools and building the package'
	@$(BIN)/python tools/pins.py > $(PINS)
	@$(PIP) setuptools wheel numpy
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname)" != Linux ] || $(PIP) --no-deps triton==$(TRITON)
	@$(PIP) --no-build-isolation --editable '.[bench,test,lint]'
	@$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0  # says 3.12 but runs on 3.11; its needs are ours
	@$(BIN)/python -m fastkm doctor
	@touch $@

# What the documentation is built with; the package itself is there.
$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $@.txt
	@$(PIP) -r $@.txt
	@touch $@

# Packages to compare with, without what they depend on: nothing may replace the torch that is measured. One that cannot
# be had is left out of the comparison, and named there.
$(VENV)/.peers: $(VENV)/.installed
	-@$(PIP) --no-deps torch-kf linear_operator jaxtyping wadler-lindig faiss-cpu
	@touch $@
