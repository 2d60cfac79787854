#!/usr/bin/env bash
# All checks: scripts/test.sh [--quick] [PYTEST OPTIONS]
#
# Sets everything up (scripts/setup.sh --dev), then lint, formatting, types and the whole test suite, two tests at a
# time (-n 0: one). Options are handed to pytest: scripts/test.sh -k nt_xent
# --quick: lint, formatting, and the tests that neither start processes nor compile nor take long: under two minutes.
# tests/conftest.py lists what it leaves out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

scripts/setup.sh --dev
activate

stage "lint: ruff check"
ruff check
stage "formatting: ruff format --check"
ruff format --check
if [ "${1:-}" != --quick ]; then
    stage "types: mypy"
    mypy
fi
stage "tests: pytest $*"
# Tests wait for processes to start and for timeouts, so two at a time keep two cores busy. Those of one file share
# what they have run, and stay together; conftest.py puts the slowest files first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
