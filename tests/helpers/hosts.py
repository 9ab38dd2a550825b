"""Whether tests can make hosts: without them they are skipped, or the run fails where promised."""

import os

import pytest

from ds_moe_ep.rehearsal.hosts import why_no_hosts

__all__ = ["REQUIRE_HOSTS", "end_without_promised_hosts", "needs_hosts"]

REQUIRE_HOSTS = "DS_MOE_EP_REQUIRE_HOSTS"
"""Set by CI: a machine that makes no hosts would leave out tests and stay green."""

_reason = why_no_hosts()
needs_hosts = pytest.mark.skipif(_reason is not None, reason=str(_reason))
"""Skips a test where no hosts can be made, with what to install."""


def end_without_promised_hosts() -> None:
    """Ends the run with the reason where `REQUIRE_HOSTS` is set and no hosts can be made."""
    if os.environ.get(REQUIRE_HOSTS) and _reason is not None:
        raise pytest.UsageError(f"{REQUIRE_HOSTS} is set: {_reason}")
