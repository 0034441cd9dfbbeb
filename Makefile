# Main commands: `make demo` and `make test`.
# `make env` creates .venv, and updates it when pyproject.toml or a native source changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned for a reproducible CPU environment; on a CUDA machine use your own Torch, see the README.
TORCH ?= torch==2.13.0
WORKERS ?= 2
SECONDS ?= 600
# The Triton of current GPU servers: kernels are compiled with it as well as with the installed one.
# There is none for other systems.
SERVER_TRITON := 3.6.0
TRITONS := $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-$(SERVER_TRITON))
# Images of a package of Debian, which need not be installed, for `losses`; FASHION= does without.
FASHION := $(if $(shell command -v apt-get),$(VENV)/fashion-mnist)
# Files whose changes require a rebuild.
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: docs env sdist wheel try-wheel demo demo-quick losses test test-extended test-all test-slow test-paths fuzz sanitize bench lint format clean

env: $(VENV)/.installed $(TRITONS)

$(VENV)/.installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[train,test,bench,lint]'
	$(BIN)/python -m unitsface_kernels
	touch $@

# Unpacked beside the environment, which imports its own. Moved when complete.
$(VENV)/triton-$(SERVER_TRITON): | $(VENV)/.installed
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$(SERVER_TRITON)
	mv $@.part $@

$(VENV)/fashion-mnist: | $(VENV)/.installed
	rm -rf $@.part
	mkdir $@.part
	@cd $@.part && (apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb . && rm *.deb) > log 2>&1 || { \
		echo "dataset-fashion-mnist cannot be downloaded (apt-get update?); without it: make losses FASHION=" >&2; exit 1; }
	mv $@.part $@

demo: env
	$(BIN)/python train/demo.py

demo-quick: env
	$(BIN)/python train/demo.py --quick

# More in ARGS: make losses ARGS="--seeds 1 --only cosface uce+uss"
losses: env $(FASHION)
	$(BIN)/python train/compare_losses.py --seeds 3 --data orl $(if $(FASHION),fashion_mnist) $(ARGS)

# Most tests keep one core busy. The tests of a file share expensive fixtures: one worker per file.
# They start many processes, which find the modules compiled.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest python_tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: env
	$(PYTEST)

# The rest of the grids, rare paths and runs of many processes; `test` has a representative of each.
test-extended: env
	$(PYTEST) -m "extended and not slow"

# Both in one run, which trains and compiles once what they share.
test-all: env
	$(PYTEST) -m "not slow"

test-slow: env
	$(BIN)/python -m pytest python_tests -m slow

# Random calls and damaged files for SECONDS; a failure is printed with the command that repeats it.
fuzz: env
	$(BIN)/python -m python_tests.fuzz --seconds $(SECONDS) --jobs $(WORKERS) $(ARGS)

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize.
sanitize: env
	bash python_tests/support/sanitize.sh $(BIN)/python

# Largest error over its tolerance, for every instruction set of this processor.
test-paths: env
	PYTHONPATH=python_tests $(BIN)/python python_tests/support/paths.py

bench: env
	$(BIN)/python -m bench --seconds 4
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.report --readme

# The site, in build/site. Its own environment: it needs neither Torch nor the extension.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=true $(VENV)-docs/bin/python -m mkdocs build --quiet --strict

$(VENV)-docs/.installed: pyproject.toml
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet $$($(VENV)-docs/bin/python docs/site/requirements.py docs)
	touch $@

# For a release, in dist/; see RELEASING.md. PYTHON is the one that builds. WHEEL_FLAGS are variables of
# packaging/wheel.sh: make wheel WHEEL_FLAGS="UNITSFACE_CUDA=ON UNITSFACE_LOCAL_VERSION=cu130"
WHEEL_FLAGS ?=
wheel: $(VENV)-wheel/.installed
	env $(WHEEL_FLAGS) bash packaging/wheel.sh $(VENV)-wheel/bin/python

sdist: $(VENV)-wheel/.installed
	bash packaging/wheel.sh $(VENV)-wheel/bin/python sdist

# As on a fresh machine, without a compiler: make try-wheel PYTHON=python3.12 TORCH=torch==2.8.0
try-wheel:
	bash packaging/try_wheel.sh "$$(ls -t dist/*.whl | head -1)" $(PYTHON) "$(TORCH)"

$(VENV)-wheel/.installed: packaging/requirements.txt
	test -x $(VENV)-wheel/bin/python || $(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet -r packaging/requirements.txt
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist runs *.egg-info unitsface_kernels/_native*.so $(VENV) $(VENV)-docs $(VENV)-wheel
