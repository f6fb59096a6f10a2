# `make demo` and `make test` set up their environment themselves; both start from a bare machine with Python >= 3.10 and a
# C++ compiler. PYTHON picks the interpreter, VENV the folder of the environment, OUT where the demo writes.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_out
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup build demo test benchmark gpu sanitize emulate emulate-sanitize resources lint format types wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

# Only what changed in csrc/ since the last build.
build: $(STAMP)
	@mkdir -p build
	@flock build/.lock $(BIN)/python setup.py -q build_ext --inplace

demo: build
	$(BIN)/lcr2s demo --out $(OUT)

test: build
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Everything that docs/performance.md shows of this machine's processor, in about twenty minutes on two otherwise idle cores:
# benchmarks/results/<machine>.csv, docs/plots and the tables of the page.
BENCHMARK_MINUTES ?= 20
benchmark: build
	$(BIN)/python benchmarks/run.py --full --report --minutes $(BENCHMARK_MINUTES)

# On a CUDA machine, from a bare tree, with the python on PATH: build, tests on CUDA and Triton, compute-sanitizer and the
# benchmark sweep, in under nine minutes. Logs, results.csv and summary.txt go to OUT.
gpu: OUT = gpu_out
gpu:
	.ci/gpu "$(OUT)"

# The CPU kernels under AddressSanitizer and UBSan, once with the baseline instruction set and once with the vector width and
# tiles of AVX-512 compiled for AVX2 processors.
SANITIZED := build/sanitized
SANITIZE_TESTS ?= python_tests/ops
sanitize: build
	LCR2S_SANITIZE=address,undefined LCR2S_EMULATE_AVX512=1 LCR2S_CUDA=0 LCR2S_BUILD_DIR=$(SANITIZED) \
	  $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED)-lib
	for isa in portable avx512; do \
	  LCR2S_LIBRARY=$(CURDIR)/$(SANITIZED)-lib/lcr2s_ext/liblcr2s.so LCR2S_CPU_ISA=$$isa \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -k "$(SANITIZE_FILTER)" $(SANITIZE_TESTS) || exit 1; \
	done

# The CUDA kernels on the host (docs/emulator.md): the operators' tests with every CPU tensor going through the CUDA side, then
# every operator in four orders of threads with the paths of two generations of GPUs.
EMULATED := $(CURDIR)/build/emulated
EMULATE_TESTS ?= $(patsubst %,python_tests/ops/test_%.py,support_attention similarity relation retrieval) \
  python_tests/cuda/test_similarity_paths.py python_tests/cuda/test_relation_paths.py python_tests/cuda/test_retrieval_paths.py
# Left out: what the kernels have no part in; bits across numbers of threads, which the library products that stand in for
# cuBLAS change; hundreds of thousands of positives, minutes in the emulator.
EMULATE_FILTER ?= not triton and not reference and not opcheck and not compile \
  and not bits_do_not_depend_on_threads and not small_workspace_changes_nothing
EMULATE_RUNS ?= forward-90
emulate: $(STAMP)
	@mkdir -p build
	flock build/.emulated.lock env LCR2S_EMULATE_CUDA=1 LCR2S_CUDA=0 LCR2S_BUILD_DIR=$(EMULATED) \
	  $(BIN)/python setup.py -q build_ext --build-lib $(EMULATED)-lib
	for run in $(EMULATE_RUNS); do \
	  LCR2S_LIBRARY=$(EMULATED)-lib/lcr2s_ext/liblcr2s.so \
	  LCR2S_EMULATE_ORDER=$${run%-*} LCR2S_EMULATE_CAPABILITY=$${run#*-} \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 -k "$(EMULATE_FILTER)" $(EMULATE_TESTS) || exit 1; \
	done
	LCR2S_LIBRARY=$(EMULATED)-lib/lcr2s_ext/liblcr2s.so $(BIN)/python python_tests/cuda/orders.py

# The same under AddressSanitizer and a part of UBSan (all of it takes minutes to compile), with the checks of a debug build, in
# a third order.
EMULATE_SANITIZE_FILTER ?= $(EMULATE_FILTER)
emulate-sanitize: $(STAMP)
	@mkdir -p build
	flock build/.emulated.lock env LCR2S_EMULATE_CUDA=1 LCR2S_CUDA=0 LCR2S_DEBUG=1 \
	  LCR2S_SANITIZE=address,alignment,signed-integer-overflow,shift \
	  LCR2S_BUILD_DIR=$(EMULATED)-sanitized $(BIN)/python setup.py -q build_ext --build-lib $(EMULATED)-sanitized-lib
	LCR2S_LIBRARY=$(EMULATED)-sanitized-lib/lcr2s_ext/liblcr2s.so LCR2S_EMULATE_ORDER=random:1 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -k "$(EMULATE_SANITIZE_FILTER)" $(EMULATE_TESTS)

# Registers and spills of every CUDA kernel, as ptxas reported them in the last build.
resources: build
	@$(BIN)/python python_tests/cuda/test_resources.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

wheel: $(STAMP)
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

clean:
	rm -rf build dist lcr2s_ext/*.so *.egg-info
