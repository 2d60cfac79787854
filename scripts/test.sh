#!/usr/bin/env bash
# All checks: scripts/test.sh [PYTEST OPTIONS]
#
# Sets everything up (scripts/setup.sh --dev), then lint, formatting, types and the whole test suite.
# Options are handed to pytest: scripts/test.sh -k nt_xent
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

scripts/setup.sh --dev
activate

stage "lint: ruff check"
ruff check
stage "formatting: ruff format --check"
ruff format --check
stage "types: mypy"
mypy
stage "tests: pytest $*"
python -m pytest "$@"
