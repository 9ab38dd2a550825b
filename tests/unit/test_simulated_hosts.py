"""Why hosts cannot be made on a machine: each time with what to install, and how.

And what becomes of tests there: they are skipped, or the run ends where hosts were promised.
"""

import os

import pytest

from ds_moe_ep.rehearsal.hosts import _unlocked, why_no_hosts
from tests import conftest
from tests.helpers import hosts
from tests.helpers.hosts import REQUIRE_HOSTS
from tests.helpers.launch import REPO

_PACKAGES = "pdsh openssh-server iproute2 util-linux"
_INSTALL = f"Hosts take root and, on Debian: apt-get install -y {_PACKAGES}."
_REFUSED = "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"


@pytest.mark.parametrize(
    ("missing", "user", "unshare", "why"),
    [
        ("pdsh", 0, "", "pdsh not found"),
        ("pdsh", 1000, "", "pdsh not found"),
        (None, 1000, "", "hosts are made of network namespaces, and this is not root"),
        (
            None,
            0,
            _REFUSED,
            "this machine makes no namespaces (unshare: unshare failed: Operation not permitted): "
            "a container needs --privileged, or at least CAP_SYS_ADMIN and CAP_NET_ADMIN",
        ),
    ],
)
def test_what_is_in_the_way_and_what_to_install(tmp_path, monkeypatch, missing, user, unshare, why):
    _play_machine(tmp_path, monkeypatch, missing, user, unshare)
    assert why_no_hosts() == f"{why}. {_INSTALL}"


def test_nothing_is_in_the_way(tmp_path, monkeypatch):
    _play_machine(tmp_path, monkeypatch, None, 0, "")
    assert why_no_hosts() is None


@pytest.mark.parametrize(
    ("promised", "reason", "is_ended"),
    [("1", _INSTALL, True), ("", _INSTALL, False), ("1", None, False)],
)
def test_a_run_ends_at_once_where_hosts_were_promised(monkeypatch, promised, reason, is_ended):
    monkeypatch.setenv(REQUIRE_HOSTS, promised)
    monkeypatch.setattr(hosts, "_reason", reason)
    if not is_ended:
        conftest.pytest_sessionstart()
        return
    with pytest.raises(pytest.UsageError, match=f"^{REQUIRE_HOSTS} is set: {_INSTALL}$"):
        conftest.pytest_sessionstart()


def test_ci_promises_hosts():
    assert f"export {REQUIRE_HOSTS}=" in (REPO / ".ci" / "run").read_text()


def _play_machine(folder, monkeypatch, missing, user, unshare) -> None:
    for name in {"pdsh", "sshd", "ip", "unshare"} - {missing}:
        (folder / name).write_text(f"#!/bin/sh\n{unshare}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: user)


def test_a_locked_root_is_let_in_on_the_hosts_and_nobody_else():
    shadow = "daemon:!:20000::::::\nroot:!$y$j9T$abc:20000:0:99999:7:::\nrootless:!:20000::::::\n"
    assert _unlocked(shadow) == shadow.replace("root:!$y$j9T$abc:", "root:*:")
