# Three commands from a bare machine (Python >= 3.10, make, a C++ compiler): `make demo`, `make demo-detection`, `make test`.
# Interpreter of a new environment; without it that of the one that is there, or python3.
PYTHON ?=
VENV = .venv
VENV_STOCK = .venv-stock

.PHONY: env demo demo-detection test test-stock lint format clean

env:
	@tools/setup_env.sh onedl $(VENV) $(PYTHON)

demo: env
	$(VENV)/bin/python tools/run_demo.py

demo-detection: env
	$(VENV)/bin/python tools/run_demo_detection.py

# site/index.html opens from disk; its search needs a server: python -m http.server -d site.
# The variable silences an advertisement.
.PHONY: docs
docs: env
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

test: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

test-stock:
	@tools/setup_env.sh stock $(VENV_STOCK) $(PYTHON)
	$(VENV_STOCK)/bin/python -m pytest

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV_STOCK) build *.egg-info .pytest_cache .ruff_cache .hypothesis
