# Every target sets up what it needs; a second run finds it done.
#   PYTHON=python3.12        the interpreter that makes .venv (3.11 or 3.12)
#   TORCH_INDEX=https://...  take torch from this index, such as PyTorch's own of CPU builds (see README)
#   ARGS='--port 8123'       flags passed on to the command
#   WORKERS=0                tests in one process; otherwise so many share them, file by file
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: serve test test-slow test-gpu check bench bench-gpu targets simulate openapi dashboards pictures clean

serve: $(VENV)/.run-installed
	$(VENV)/bin/loramux serve $(ARGS)

test: $(VENV)/.dev-installed
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.dev-installed
	$(VENV)/bin/python -m pytest -m "not gpu" $(ARGS)

# On a machine with a GPU; figures with card, versions and commit are kept.
test-gpu: $(VENV)/.dev-installed
	GPU_FIGURES=benchmarks/results/gpu-tests.json $(VENV)/bin/python -m pytest -m gpu \
		--junitxml=benchmarks/results/gpu-tests.xml tests/gpu tests/kernels $(ARGS)

check: $(VENV)/.dev-installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(VENV)/.dev-installed
	$(VENV)/bin/python -m benchmarks.serving $(ARGS)

bench-gpu: $(VENV)/.dev-installed
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

# What kept runs reached of what was to be reached.
targets: $(VENV)/.run-installed
	$(VENV)/bin/python -m benchmarks.targets $(ARGS)

simulate: $(VENV)/.run-installed
	$(VENV)/bin/python -m benchmarks.simulator $(ARGS)

openapi: $(VENV)/.dev-installed
	$(VENV)/bin/python openapi/generate.py

dashboards: $(VENV)/.dev-installed
	$(VENV)/bin/python grafana/make_dashboards.py

# Those of docs/pictures; needs Debian's packages chromium, chromium-driver and prometheus.
pictures: $(VENV)/.dev-installed
	$(VENV)/bin/python -m docs.make_pictures

$(VENV)/.run-installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "loramux needs Python 3.11 or newer; name one with PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(PIP) install -c constraints.txt -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
