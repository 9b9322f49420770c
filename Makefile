# Works from a clean clone on Debian with python3 (3.11 or newer), python3-venv and make. `make help` lists the targets.

PYTHON ?= python3
# torch and torchvision as tested; on a GPU host choose others: make test TORCH="torch torchvision"
TORCH ?= torch==2.14.1 torchvision==0.29.1
# what `make train` runs: make train CONFIG=int8 ARGS="--set training.epochs=1"
CONFIG ?= fqt_1bit.yaml
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help train test test-native test-arm gpu-check lint sanitize data clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

train: $(STAMP) data ## train the main job (CONFIG=..., ARGS="--set key=value ..."): 1 bit forward and backward, Fashion-MNIST
	$(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=1 train/main.py --config $(CONFIG) $(ARGS)
	@echo "Curves: $(BIN)/tensorboard --logdir runs, then open the address that it prints"

# more than 8 processes at a time, each with torch of its own, cost more memory than they save time
test: $(STAMP) ## run the tests, a process a core
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-native: build/check/check ## the kernels alone, without Python or torch, on every instruction set of this machine (a minute)
	build/check/check $(FQT_TEST_SEED)

test-arm: ## the same for AArch64, NEON among them: cross-compiled, and run by qemu (a minute)
	@command -v $(ARM_CXX) >/dev/null && command -v $(QEMU) >/dev/null || \
	  { echo "no $(ARM_CXX) or no $(QEMU) here: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	@$(MAKE) build/check-arm/check
	$(QEMU) build/check-arm/check $(FQT_TEST_SEED)

ARM_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
# floats must round as the extension's, whose flags stand in setup.py
CHECK_FLAGS := -std=c++20 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -pthread
# of the extension's files those that know no torch: one for each instruction set of a family
KERNEL_SOURCES := $(shell grep -L 'torch/' fqt/cpu/csrc/*/*.cpp)
CHECK_SOURCES := $(wildcard tests/csrc/*.cpp) $(KERNEL_SOURCES)

# $(call check,directory,compiler,further flags): the program of tests/csrc with every kernel, in a directory of its own
define check
$(1)/%.o: %.cpp $(wildcard tests/csrc/*.h fqt/cpu/csrc/*/*.h)
	@mkdir -p $$(@D)
	$(2) $(CHECK_FLAGS) $(3) -c $$< -o $$@
$(1)/check: $(CHECK_SOURCES:%.cpp=$(1)/%.o)
	$(2) -pthread $(3) $$^ -o $$@
endef
$(eval $(call check,build/check,$(CXX),-O3))
$(eval $(call check,build/check-arm,$(ARM_CXX),-O3 -static))

# the same with the kernels that the extension has, where setup.py left its objects (`make test` asks for it)
build/check-extension/check: $(patsubst %.cpp,build/check-extension/%.o,$(wildcard tests/csrc/*.cpp)) $(KERNEL_SOURCES:%.cpp=build/extension/%.o)
	$(CXX) -pthread $^ -o $@
build/check-extension/%.o: %.cpp $(wildcard tests/csrc/*.h fqt/cpu/csrc/*/*.h)
	@mkdir -p $(@D)
	$(CXX) $(CHECK_FLAGS) -O1 -c $< -o $@

# not in .venv: a GPU host has a torch of its own, which PYTHON names
gpu-check: ## on a GPU: compare every kernel with the reference, time them, test; ARGS="--parts smoke,products --json F.jsonl"
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

lint: .venv/linted ## ruff, pyright, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	PYTHONPATH=. $(BIN)/lint-imports

# a package of its own under build/, so that no instrumented library stays in place; setup.py's -O3 stands behind these flags
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0

$(eval $(call check,build/check-sanitized,$(CXX),-O1 $(SANITIZE)))

sanitize: $(STAMP) build/check-sanitized/check ## the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	build/check-sanitized/check $(FQT_TEST_SEED)
	rm -rf build/sanitize/lib
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build \
	  --build-base build/sanitize --build-lib build/sanitize/lib
	@test -f build/sanitize/lib/fqt/_cpu.so || { echo "the extension was not built with sanitizers, see above"; exit 1; }
	$(SANITIZED) PYTHONPATH=build/sanitize/lib $(BIN)/python -P -m fqt doctor
	$(SANITIZED) PYTHONPATH=. $(BIN)/pytest -q -o pythonpath=build/sanitize/lib tests/fqt/test_kernels.py tests/fqt/test_norm.py

data: $(STAMP) ## get Fashion-MNIST: already here, by apt, by apt without root, or left to torchvision's download
	@found() { $(BIN)/python -c 'import sys; from train.data import find_fashion_mnist; place = find_fashion_mnist(); \
	    print("Fashion-MNIST:", place or "not here"); sys.exit(place is None)'; }; \
	 if found; then exit 0; fi; \
	 if [ "$$(id -u)" = 0 ]; then apt-get -q update && apt-get -q install -y dataset-fashion-mnist; \
	 else mkdir -p data/apt && (cd data/apt && apt-get -q download dataset-fashion-mnist && dpkg-deb -x *.deb .) && \
	   mv data/apt/usr/share/datasets/fashion-mnist data/; rm -rf data/apt; fi; \
	 found || echo "apt has it not; torchvision will try to download it"

# A second try, past the cache: the pip that Debian puts into a new environment takes a download that was cut short for a wrong
# hash, and gives up. PATH leads the extension's build to ninja.
get = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q $(1) || { sleep 5; \
  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-cache-dir $(1); }

# torch first, then fqt against it: the extension is built with the torch it will run with
$(STAMP): pyproject.toml setup.py $(wildcard fqt/cpu/csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fqt needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No virtual environment could be made: apt-get install python3-venv"; exit 1; }
	$(call get,$(TORCH) 'setuptools>=77' wheel ninja)
	$(call get,--no-build-isolation -e '.[test]')
	@touch $@

.venv/linted: $(STAMP)
	$(call get,--no-build-isolation -e '.[dev]')
	@touch $@

clean: ## remove the environment, builds and caches; runs/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
