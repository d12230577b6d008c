# make demo   train on digits, evaluate at every patch size, write runs/demo/report.html; then the same for a fixed ViT
# make test   the default tests: at most 4 minutes on two cores, at most 480 seconds of CPU
# make test-full   the tests that take longer (markers full and slow): all pages of docs/, all configs, kills, several processes
# make test-convert   the tests that need PyTorch, timm, transformers, ONNX; in an environment of their own
# make faults  the tests that inject faults: kills, signals, damaged files, full disks (docs/reliability.md)
# make lint   ruff, mypy, import-linter
# make miniature  the paper's experiments on CIFAR-10, DATA_DIR=where TFDS prepared it; hours
# make paper  the tables and quoted numbers of docs/ and README.md from results/*.csv, and docs/paper.md, claim by claim
# make docs   the documentation as a site, with the API reference: build/docs/index.html; warnings are errors
# make docs-serve  the same at http://127.0.0.1:8000
# make clean  remove the virtual environments and all caches; runs/ stays
#
# Another interpreter: make test PYTHON=python3.12
# An accelerator, when the environment is made: make demo JAX=cuda13 (or cuda12, tpu)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed

CONVERT_VENV := .venv-convert
CONVERT_STAMP := $(CONVERT_VENV)/.installed

DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

.PHONY: demo test test-full test-convert faults lint miniature paper docs docs-serve clean

# The page is there as soon as FlexiViT is trained, and is written again with the baseline.
demo: $(CORE)
	$(BIN)/flexivit train --config configs/digits.py --workdir runs/demo/flexivit
	$(BIN)/flexivit report runs/demo/flexivit --out runs/demo
	@echo "Open that page now. A ViT of one patch size follows, trained with the same FLOPs; the page will then show both."
	$(BIN)/flexivit train --config configs/digits.py:fixed=8 --workdir runs/demo/fixed8
	$(BIN)/flexivit report runs/demo/flexivit runs/demo/fixed8 --out runs/demo
	$(BIN)/flexivit demo runs/demo/flexivit --static runs/demo/page --number 10
	@echo "Open runs/demo/page/index.html and move the slider. Photos of your own need a model of photos, e.g. timm's ViT-Ti/16:"
	@echo "  pip install '.[serve]' && flexivit serve vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors --image_size 240 --seqhw 5,8,15,30 --demo"

# The tests start hundreds of processes, which need not compile the package's modules each.
test test-full test-convert faults: export PYTHONDONTWRITEBYTECODE =

# As many processes as cores; the tests of a file stay together, for they share what takes long to make.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-full: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "(full or slow) and not gpu and not convert"

test-convert: $(CONVERT_STAMP)
	$(CONVERT_VENV)/bin/python -m pytest --numprocesses auto --dist loadfile -m convert

# Two at a time; the same command resumes where it was stopped.
miniature: $(STAMP)
	$(BIN)/python tools/paper/miniature.py --out runs/miniature --jobs 2 $(if $(DATA_DIR),--data_dir $(DATA_DIR))

paper: $(STAMP)
	$(BIN)/python tools/paper/tables.py
	$(BIN)/python tools/paper/claims.py

docs: $(DOCS_STAMP)
	$(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going -c docs/site -d build/docs-cache . build/docs
	@echo "Open build/docs/index.html"

docs-serve: docs
	$(DOCS_VENV)/bin/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

faults: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "faults and not gpu and not convert"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the demo needs. All is pinned, so nothing is resolved; a module is compiled when it is first imported.
$(CORE): requirements-core.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Setting up $(VENV) (once, less than a minute) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --no-deps -r requirements-core.txt -e .
	$(if $(JAX),$(PIP) --no-compile -r requirements-core.txt "jax[$(JAX)]")
	@touch $@

# All that is pinned. Modules are compiled here, since warnings of their compilation would be errors in the tests.
$(STAMP): $(CORE) requirements.txt requirements-browser.txt requirements-buckets.txt requirements-detect.txt requirements-serve.txt requirements-text.txt
	@echo "Adding TFDS and the tools for tests to $(VENV) (once) ..."
	$(PIP) --no-compile --no-deps -r requirements.txt -r requirements-browser.txt -r requirements-buckets.txt -r requirements-detect.txt -r requirements-serve.txt -r requirements-text.txt
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@

# All in one call, so that torch and torchvision are chosen together; the stamp is written once all four can be imported.
$(CONVERT_STAMP): requirements-core.txt requirements.txt requirements-browser.txt requirements-convert.txt setup.cfg pyproject.toml
	@echo "Setting up $(CONVERT_VENV) (once, about two minutes) ..."
	$(PYTHON) -m venv $(CONVERT_VENV)
	$(CONVERT_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-browser.txt -r requirements-convert.txt
	$(CONVERT_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(CONVERT_VENV)/bin/python tools/maintain/check_frameworks.py
	@touch $@

# The core too: the API reference is read from the imported package.
$(DOCS_STAMP): requirements-core.txt requirements-docs.txt setup.cfg pyproject.toml
	@echo "Setting up $(DOCS_VENV) (once, less than a minute) ..."
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-docs.txt -e .
	@touch $@

clean:
	rm -rf $(VENV) $(CONVERT_VENV) $(DOCS_VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
