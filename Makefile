# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv from requirements.lock first.
# FORWARDGRAD_DATA, where it is set, names a folder that already holds MNIST and CIFAR-10; it reaches the recipes as it is.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := 2.13.0# what `make lock` pins: raised on purpose only, since a newer torch can bring gigabytes along

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_COMPILE := 1# Python compiles what it imports; to compile all that is installed takes longer than to install it
# So it has to keep what it compiled: without, each Python that a test starts compiles torch's sources anew, two seconds and more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-full docs lint types wheel lock clean

demo: $(READY)
	$(BIN)/forwardgrad demo --out demo

# Each worker gets whole files as far as can be, so what the tests of a file share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Every behaviour once.
test: $(READY)
	$(PYTEST) -m "not full and not rest"

# What takes longer: kills, faults, compiled variants, and more cases of each product. PART=2/4 takes the second of four parts.
PART ?= 1/1
test-full: $(READY)
	$(PYTEST) -m "full and not rest" --part $(PART)

# Every test there is, full products of cases with them.
test-all: $(READY)
	$(PYTEST)

# The site, whole and without one warning: build/site/index.html, which needs no server and no network.
docs: $(READY)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir build/doctrees docs build/site
	@echo "site: build/site/index.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "forwardgrad needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): name another with 'make PYTHON=python3.11'." >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The comment at the head of the lock is kept; local version tags (+cpu) and torch's accelerator companions are dropped.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet 'torch==$(TORCH)' '.[dev]'
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude forwardgrad > build/lock/frozen
	grep '^#' requirements.lock > build/lock/new
	sed -E -e 's/\+[[:alnum:].]+$$//' -e '/^(nvidia|cuda|triton)[-_=]/d' build/lock/frozen >> build/lock/new
	mv build/lock/new requirements.lock
	rm -rf build

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
