"""launch/setup.sh with a stand-in for Python: what it says is missing, when it installs again."""

import os
import shutil
import subprocess

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

# Writes down how it is called, fails where told to, and "makes" environments with itself inside.
_FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in *"$FAIL_ON"*) exit 1 ;; esac
case "$*" in
    --version) echo "Python $FAKE_VERSION" ;;
    "-m venv --clear .venv") rm -rf .venv ;;&
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


_OPTIONAL = [
    "--no-deps --ignore-requires-python megatron-core==0.19.2",
    "--only-binary :all: atheris==3.0.0",
]


@pytest.fixture
def clone(tmp_path):
    """A folder with what the script needs; `clone(...)` runs it and returns what it called."""
    (tmp_path / "launch").mkdir()
    shutil.copy(REPO / "launch" / "setup.sh", tmp_path / "launch")
    (tmp_path / "pyproject.toml").write_text("one")
    python = tmp_path / "python"
    python.write_text(_FAKE_PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*args: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls.write_text("")
        result = run_command(
            ["bash", tmp_path / "launch" / "setup.sh", *args],
            env={
                "PYTHON": str(python),
                "CALLS": str(calls),
                "FAIL_ON": "nothing",
                "FAKE_VERSION": "3.11.2",
                "TORCH": "torch==2.13.0",
                **env,
            },
            cwd=tmp_path,
        )
        pip = " -m pip install --quiet --no-input --disable-pip-version-check "
        calling = [f" {call}" for call in calls.read_text().splitlines()]
        return result, [call.removeprefix(pip) for call in calling if call.startswith(pip)]

    return run


def test_torch_is_installed_first_and_all_of_it_once(clone):
    result, installed = clone()
    assert result.returncode == 0, result.stderr
    assert installed == ["torch==2.13.0", "--editable ."]
    assert clone()[1] == []
    assert clone("test")[1] == ["torch==2.13.0", "--editable .[test]", *_OPTIONAL]
    assert clone("test")[1] == clone()[1] == []


def test_a_new_pyproject_is_installed_again(clone, tmp_path):
    clone("test")
    (tmp_path / "pyproject.toml").write_text("two")
    assert clone()[1] == ["torch==2.13.0", "--editable ."]
    assert clone("test")[1] == ["torch==2.13.0", "--editable .[test]"]
    assert clone()[1] == []


@pytest.mark.parametrize("change", [{"TORCH": "torch==2.12.0"}, {"FAKE_VERSION": "3.12.1"}])
def test_another_torch_or_python_gets_a_new_environment(clone, tmp_path, change):
    clone()
    (tmp_path / ".venv" / "old").write_text("")
    _, installed = clone(**change)
    assert installed == [change.get("TORCH", "torch==2.13.0"), "--editable ."]
    assert not (tmp_path / ".venv" / "old").exists()


def test_a_moved_folder_gets_a_new_environment(clone, tmp_path):
    clone()
    (tmp_path / ".venv" / "made-for").write_text("/elsewhere, torch==2.13.0, Python 3.11.2")
    assert clone()[1] == ["torch==2.13.0", "--editable ."]


def test_an_environment_of_the_users_own_is_kept(clone, tmp_path):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "python", own)
    (tmp_path / ".venv" / "mine").write_text("")
    assert clone()[1] == ["torch==2.13.0", "--editable ."]
    assert (tmp_path / ".venv" / "mine").exists()


def test_an_interrupted_installation_goes_on(clone):
    result, _ = clone(FAIL_ON="--editable")
    assert result.returncode == 1
    assert "pip could not install this (exit code 1; 124: not done in 1800 s)." in result.stderr
    assert clone()[1] == ["torch==2.13.0", "--editable ."]


@pytest.mark.parametrize("package", ["megatron-core==0.19.2", "atheris==3.0.0"])
def test_without_what_is_optional_the_tests_go_on(clone, package):
    result, installed = clone("test", FAIL_ON=package)
    assert (result.returncode, installed[-2:]) == (0, _OPTIONAL)
    assert result.stderr.endswith(f"set-up: tests go on without {package}\n")
    assert clone("test")[1] == [call for call in _OPTIONAL if package in call]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PYTHON": "no-such-python"}, "there is no no-such-python here. Install it:"),
        ({"FAIL_ON": "version_info"}, "Python 3.11.2 is too old; 3.10 or newer is needed."),
        ({"FAIL_ON": "ensurepip"}, "python3-venv is missing. Install it:\nset-up:   sudo apt-get"),
    ],
)
def test_what_is_missing_is_named_with_the_command_to_install_it(clone, env, message):
    result, installed = clone(**env)
    assert (result.returncode, installed) == (1, [])
    assert message in result.stderr


@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/quickstart.sh", "tests/run.sh"])
def test_scripts_run_from_anywhere_and_stop_at_the_first_error(script):
    text = (REPO / script).read_text()
    assert 'set -euo pipefail\ncd "$(dirname "${BASH_SOURCE[0]}")/.."\n' in text
    assert os.access(REPO / script, os.X_OK)
    assert run_command(["bash", "-n", REPO / script]).returncode == 0
