# Short names for the scripts; the scripts and CONTRIBUTING.md say what they do.
PYTHON_IN_VENV = .venv/bin/python

.PHONY: help setup demo format check test test-distributed smoke audit clean

help:
	@echo "make setup             .venv with everything that development needs, FFCV included"
	@echo "make demo              the main job on the built-in data set, with its report"
	@echo "make format            write ruff's formatting and its safe fixes"
	@echo "make check             lint, formatting and types"
	@echo "make test              check, then all tests"
	@echo "make test-distributed  the tests with several processes"
	@echo "make smoke             scripts/test.sh --quick: lint, and the tests that start no processes: two minutes"
	@echo "make audit             installed packages against known vulnerabilities (needs the network)"
	@echo "make clean             remove caches and built files; data, results and .venv stay"

setup:
	scripts/setup.sh --dev

demo:
	scripts/demo.sh

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test:
	scripts/test.sh

test-distributed: setup
	$(PYTHON_IN_VENV) -m pytest -m distributed

smoke:
	scripts/test.sh --quick

audit: setup
	scripts/audit.sh

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
