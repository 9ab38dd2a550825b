"""Everything here runs megatron-core on CPUs, and is skipped where it is not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_moe_ep.megatron.stand_ins import megatron_stand_ins
from tests.helpers.megatron import require_megatron


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what Megatron says of its own future, a hundred times."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def megatron_is_installed() -> None:
    require_megatron()


@pytest.fixture(autouse=True)
def stand_ins(megatron_is_installed: None) -> Iterator[None]:
    with megatron_stand_ins():
        yield
