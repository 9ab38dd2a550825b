#!/usr/bin/env bash
# Makes .venv in the repository's root and installs ds_moe_ep into it. Does nothing where that is done.
#
#   bash launch/setup.sh          what it takes to run
#   bash launch/setup.sh test     and to test
#
#   TORCH    the torch to install, by itself and first, so that no other package chooses one
#   PYTHON   the Python to use, 3.10 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="${TORCH:-torch==2.13.0}"
PYTHON="${PYTHON:-python3}"
EXTRA="${1:-}"
MEGATRON="megatron-core==0.19.2" # optional, for tests/megatron
ATHERIS="atheris==3.0.0" # optional, for tests/unit/test_fuzz.py
LIMIT_S=1800 # for one installation; a slow network needs a while for torch

fail() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

check_python() {
    "$PYTHON" --version > /dev/null 2>&1 ||
        fail "there is no $PYTHON here. Install it:" "  sudo apt-get install -y python3 python3-venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$PYTHON" --version) is too old; 3.10 or newer is needed. Name another:" \
            "  PYTHON=python3.12 bash $0"
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null ||
        fail "$PYTHON cannot make environments: python3-venv is missing. Install it:" \
            "  sudo apt-get install -y python3-venv"
}

# An environment knows its own path and holds one torch, so it is made anew when these change.
make_environment() {
    local wanted clear=()
    wanted="$PWD, $TORCH, $("$PYTHON" --version)"
    if [ -e .venv/made-for ] && [ "$(< .venv/made-for)" != "$wanted" ]; then
        clear=(--clear)
    fi
    if [ ${#clear[@]} -gt 0 ] || ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        "$PYTHON" -m venv "${clear[@]}" .venv
    fi
    printf '%s' "$wanted" > .venv/made-for
}

install() {
    local start=$SECONDS
    printf 'set-up: pip install %s\n' "$*"
    timeout --foreground "$LIMIT_S" .venv/bin/python -m pip install \
        --quiet --no-input --disable-pip-version-check "$@" ||
        fail "pip could not install this (exit code $?; 124: not done in $LIMIT_S s)." \
            "Once that is mended, run the same command again; it goes on from here."
    printf 'set-up: done in %d s\n' $((SECONDS - start))
}

# One set-up at a time in this folder; the lock goes with the process.
exec 9< .
flock --wait "$LIMIT_S" 9 || fail "another set-up has been running here for $LIMIT_S s. End it first."

check_python
make_environment
# Each stamp holds the pyproject.toml that was installed. The test environment is also one to run in.
wanted=$(sha256sum pyproject.toml)
stamp=".venv/installed${EXTRA:+-$EXTRA}"
if ! [ -e "$stamp" ] || [ "$(< "$stamp")" != "$wanted" ]; then
    install "$TORCH"
    install --editable ".${EXTRA:+[$EXTRA]}"
    printf '%s' "$wanted" | tee "$stamp" > .venv/installed
fi

# Where one of these cannot be had, its tests are skipped.
install_optional() {
    local package="$1" stamp=".venv/installed-${1%%=*}"
    shift
    if [ "$EXTRA" = test ] && ! { [ -e "$stamp" ] && [ "$(< "$stamp")" = "$package" ]; }; then
        (install "$@" "$package") && printf '%s' "$package" > "$stamp" ||
            printf 'set-up: tests go on without %s\n' "$package" >&2
    fi
}

# It asks for Python 3.12 and runs on older ones too (ds_moe_ep/megatron/stand_ins.py).
install_optional "$MEGATRON" --no-deps --ignore-requires-python
# Wheels only: to build it takes clang and minutes.
install_optional "$ATHERIS" --only-binary :all:
