#!/usr/bin/env bash
# Sets up what the tests need and passes them all: lint, format, types, then every tier, fast ones first.
#
#   bash tests/run.sh                         everything
#   bash tests/run.sh -m "not slow" -x        what follows goes to pytest
#
# TORCH and PYTHON choose what to test with; see launch/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() {
    local start=$SECONDS
    "$@" || {
        printf '== failed: %s (%d s)\n' "$*" $((SECONDS - start)) >&2
        exit 1
    }
    printf '== %s: %d s\n' "$*" $((SECONDS - start))
}

stage bash launch/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"
stage ruff check
stage ruff format --check
stage mypy
printf '== pytest\n'
exec python -m pytest --durations=10 "$@"
