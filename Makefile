# Three commands from a bare machine (Python >= 3.10, make): `make demo`; with a C++ compiler also `make demo-detection` and
# `make test`, which complete the same environment.
# Interpreter of a new environment; without it that of the one that is there, or python3.
PYTHON ?=
VENV = .venv
VENV_STOCK = .venv-stock

.PHONY: env env-demo demo demo-detection demo-compact test test-stock lint format clean

env:
	@tools/setup_env.sh onedl $(VENV) $(PYTHON)

# What the demo needs of it: no detector, nothing compiled.
env-demo:
	@tools/setup_env.sh demo $(VENV) $(PYTHON)

demo: env-demo
	$(VENV)/bin/python tools/run_demo.py

demo-detection: env
	$(VENV)/bin/python tools/run_demo_detection.py

demo-compact: env-demo
	$(VENV)/bin/python tools/run_demo_compact.py

# site/index.html opens from disk; its search needs a server: python -m http.server -d site.
# The variable silences an advertisement.
.PHONY: docs
docs: env
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

test: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-stock:
	@tools/setup_env.sh stock $(VENV_STOCK) $(PYTHON)
	$(VENV_STOCK)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV_STOCK) build site *.egg-info .pytest_cache .ruff_cache .hypothesis
