# make demo   train two small models on synthetic radiographs and compare what they find
# make test   the test suite
# make test-slow   the few tests that show once more, by another way, what a faster one shows
# make bench   how long a training step, an evaluation and a start take (docs/performance.md)
# make coverage   the suite, and which lines no test runs
# make notebook   the tutorials as docs/*.ipynb; that on phantoms is run, that on MedNIST has no pictures
# Each does all the set-up: a .venv here, with uv and the dependencies. Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow bench coverage lint notebook clean

demo: $(VENV)/.installed
	PYTHON=$(RUN) bash scripts/recipes/demo.sh

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal tests

test-slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal -m slow tests

bench: $(VENV)/.installed
	for name in train_step iw_evaluation sampling scoring startup loading scaling; do $(RUN) -m benchmarks.$$name --json bench_$$name.json || exit 1; done

coverage: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered tests

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# docs/tutorial.ipynb from docs/tutorial.py, with its pictures. Those of MedNIST are not ours to distribute.
notebook: $(VENV)/.installed-dev
	$(RUN) -m uv pip install --quiet --python $(RUN) nbconvert ipykernel || $(RUN) -m pip install --quiet nbconvert ipykernel
	$(RUN) -m jupytext --to ipynb --set-kernel python3 --execute docs/tutorial.py
	$(RUN) -m jupytext --to ipynb --set-kernel python3 docs/tutorial_mednist.py

# uv is several times faster than pip; where it fails, pip does the same.
define install
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if sys.version_info >= (3, 11) else "error: " + sys.executable + " is Python " + v + "; 3.11 or newer is needed. Name one: make PYTHON=python3.12")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) has no working venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	@$(RUN) -m uv --version >/dev/null 2>&1 || $(RUN) -m pip install --quiet uv || true
	$(RUN) -m uv pip install --quiet --python $(RUN) -r $(1) || $(RUN) -m pip install --quiet -r $(1)
	@touch $@
endef

$(VENV)/.installed: requirements.txt
	$(call install,requirements.txt)

$(VENV)/.installed-dev: requirements-dev.txt requirements-medical.txt requirements.txt
	$(call install,requirements-dev.txt)

clean:
	rm -rf $(VENV)
