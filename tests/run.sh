#!/usr/bin/env bash
# Sets up what the tests need and passes them all: lint, format, types, then every tier, fast ones first.
#
#   bash tests/run.sh                         everything
#   bash tests/run.sh -m "not slow" -x        what follows goes to pytest
#
# TORCH and PYTHON choose what to test with; see launch/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

trap 'printf "== in all: %d s\n" $SECONDS' EXIT # also when something has failed

stage() {
    local start=$SECONDS
    "$@" || {
        printf '== failed: %s (%d s)\n' "$*" $((SECONDS - start)) >&2
        exit 1
    }
    printf '== %s: %d s\n' "$*" $((SECONDS - start))
}

# What the tests of a cluster on one machine need, the browser that looks at reports, and the
# Prometheus that asks what the dashboard asks. Without them tests say so and are skipped; a machine
# run by systemd would start servers for everybody, which is not for a test to decide.
install_host_packages() {
    if [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get > /dev/null; then
        return
    fi
    export DEBIAN_FRONTEND=noninteractive
    install_missing pdsh openssh-server iproute2 faketime
    install_missing chromium # by itself, like the next: not every distribution has it
    install_missing prometheus
}

install_missing() {
    dpkg -s "$@" > /dev/null 2>&1 && return
    timeout 300 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends "$@" ||
        printf '== not installed: %s\n' "$*"
}

stage install_host_packages
stage bash launch/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"
stage ruff check
stage ruff format --check
stage mypy
printf '== pytest\n'
python -m pytest --durations=10 "$@"
