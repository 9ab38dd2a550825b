"""tests/run.sh with stand-ins for what it calls: what it installs, its exit code, and the time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

_INSTALLS = not Path("/run/systemd/system").is_dir()  # not on a machine that starts servers
_PACKAGES = ["pdsh openssh-server iproute2 faketime", "chromium", "prometheus"]


def _run(folder: Path, failing: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the script as root, where each thing it calls notes in `asked` how it was called."""
    names = ["launch/setup.sh", *(f".venv/bin/{name}" for name in ("ruff", "mypy", "python"))]
    for name in [*names, "bin/dpkg", "bin/apt-get", "bin/id"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        code = 5 if path.name == failing else 0
        note = f'echo "{path.name} $*" >> "{folder}/asked"'
        path.write_text(f"#!/bin/sh\n{'echo 0' if path.name == 'id' else note}\nexit {code}\n")
        path.chmod(0o755)
    (folder / "tests").mkdir()
    script = shutil.copy(REPO / "tests" / "run.sh", folder / "tests")
    return run_command(["bash", script, "-k", "one"], env={"PATH": f"{folder}/bin:/usr/bin:/bin"})


def _asked(folder: Path, *names: str) -> list[str]:
    lines = (folder / "asked").read_text().splitlines()
    return [line for line in lines if line.split()[0] in names]


@pytest.mark.parametrize(
    ("failing", "code", "last_stage"),
    [
        (None, 0, "python"),
        ("python", 5, "python"),
        ("mypy", 1, "mypy"),
        ("setup.sh", 1, "setup.sh"),
    ],
)
def test_its_exit_code_and_the_time_in_all(tmp_path, failing, code, last_stage):
    ended = _run(tmp_path, failing)
    assert ended.returncode == code, ended.stderr
    assert re.fullmatch(r"== in all: \d+ s", ended.stdout.splitlines()[-1])
    ran = _asked(tmp_path, "setup.sh", "ruff", "mypy", "python")
    assert ran[-1].split()[0] == last_stage
    if last_stage == "python":
        assert ran[-1] == "python -m pytest --durations=10 -k one"


def test_packages_that_are_there_are_not_installed(tmp_path):
    assert _run(tmp_path).returncode == 0
    asked = [f"dpkg -s {packages}" for packages in _PACKAGES]
    assert _asked(tmp_path, "dpkg", "apt-get") == (asked if _INSTALLS else [])


@pytest.mark.parametrize("failing", ["dpkg", "apt-get"])
def test_packages_that_are_missing_are_installed_where_that_works(tmp_path, failing):
    """All that tests of hosts, the browser and the dashboard need; without them tests are left out.

    A distribution that lacks one does not fail the run here.
    """
    ended = _run(tmp_path, failing)
    assert ended.returncode == 0, ended.stderr
    installed = [f"apt-get install -y -qq --no-install-recommends {each}" for each in _PACKAGES]
    if failing == "dpkg" and _INSTALLS:
        assert [each for each in _asked(tmp_path, "apt-get") if "install" in each] == installed
    assert "not installed" not in ended.stdout
