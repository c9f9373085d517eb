# make train | test | test-deep | lint | bench | gpu | report      PYTHON=... uses an environment you already have and installs nothing.
# TORCH_INDEX=URL takes torch's wheels from that index (https://pytorch.org/get-started/locally/ names them).

VENV := .venv
ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif
ARGS ?=
JOBS ?= auto

.PHONY: help train test test-deep lint format clean bench gpu report compile-matrix
help:
	@echo "make train      train the tiny GPT on the standard library's sources (ARGS='--attn sdpa ...' are passed on)"
	@echo "make test       the fast tests, at most five minutes on two cores"
	@echo "make test-deep  the long tests, at most twenty"
	@echo "make bench      our kernels' times as multiples of stock torch ops, compared with the saved ones"
	@echo "make gpu        on a machine with a GPU: tests, benches and training runs in ten minutes, with plain python3"
	@echo "make compile-matrix  compile the kernels for GPUs that are not here with Triton 3.6, 3.7 and 3.9 (half an hour)"
	@echo "make report     draws results/ and rewrites the tables of the READMEs"
	@echo "make lint       ruff, check and format;  make format  lets it rewrite"

train: $(READY)
	$(PY) -m gptlib.train $(ARGS)

test: $(READY)
	$(PY) -m pytest tests -n $(JOBS) $(ARGS)

test-deep: $(READY)
	$(PY) -m pytest tests -n $(JOBS) -m deep $(ARGS)

bench: $(READY)
	$(PY) bench/ratios.py $(ARGS)

gpu:
	$(or $(PYTHON),python3) bench/gpu.py $(ARGS)

compile-matrix: $(READY)
	$(PY) bench/compile_matrix.py $(ARGS)

report: $(READY)
	$(PY) bench/report.py $(ARGS)

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "this project needs Python 3.11 or newer as python3" >&2; exit 2; }
	python3 -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PY) -m pip install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
