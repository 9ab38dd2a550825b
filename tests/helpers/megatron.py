"""Whether tests have megatron-core: without it they are skipped, or fail where it was promised."""

import os

import pytest

from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.stand_ins import import_megatron

__all__ = ["REQUIRE_MEGATRON", "require_megatron"]

REQUIRE_MEGATRON = "DS_MOE_EP_REQUIRE_MEGATRON"
"""Set by CI: an environment without megatron-core would leave out tests and stay green."""


def require_megatron() -> None:
    """Imports megatron-core; without it skips the test, or fails if `REQUIRE_MEGATRON` is set."""
    try:
        import_megatron()
    except MegatronError as error:
        if os.environ.get(REQUIRE_MEGATRON):
            pytest.fail(f"{REQUIRE_MEGATRON} is set: {error}")
        pytest.skip(str(error))
