"""tests/run.sh with stand-ins for what it calls: its exit code, and the time it tells last."""

import re
import shutil

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO


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
    stand_ins = ["launch/setup.sh", *(f".venv/bin/{name}" for name in ("ruff", "mypy", "python"))]
    stand_ins.append("bin/dpkg")  # says that all packages are there
    for name in stand_ins:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ends_with = 5 if path.name == failing else 0
        path.write_text(f'#!/bin/sh\necho "ran {path.name} $*"\nexit {ends_with}\n')
        path.chmod(0o755)
    (tmp_path / "tests").mkdir()
    script = shutil.copy(REPO / "tests" / "run.sh", tmp_path / "tests")
    ended = run_command(
        ["bash", script, "-k", "one"], env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    )
    assert ended.returncode == code, ended.stderr
    lines = ended.stdout.splitlines()
    assert re.fullmatch(r"== in all: \d+ s", lines[-1])
    ran = [line.split()[1] for line in lines if line.startswith("ran ") and "dpkg" not in line]
    assert ran[-1] == last_stage
    if last_stage == "python":
        assert "ran python -m pytest --durations=10 -k one" in lines
