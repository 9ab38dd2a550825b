"""Everything here runs megatron-core on CPUs, and is skipped where it is not installed."""

from collections.abc import Iterator

import pytest

from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.stand_ins import import_megatron, megatron_stand_ins


@pytest.fixture(scope="session", autouse=True)
def megatron_is_installed() -> None:
    try:
        import_megatron()
    except MegatronError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def stand_ins(megatron_is_installed: None) -> Iterator[None]:
    with megatron_stand_ins():
        yield
