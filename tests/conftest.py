"""Settings of the whole test run: offline, one thread, GPU tests only where there is a GPU."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines that run the tests are shared, so a slow example is no failure; CI repeats itself.
settings.register_profile("ds_moe_ep", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("ds_moe_ep")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what tests/parity/test_families.py asks for."""
    parser.addoption(
        "--write-models-doc",
        action="store_true",
        help="write docs/models.md from what tests/parity sees, instead of comparing with it",
    )


def pytest_sessionstart() -> None:
    """Ends the run at once where hosts were promised and none can be made."""
    from tests.helpers.hosts import end_without_promised_hosts

    end_without_promised_hosts()


_GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything in tests/gpu, and skips what is marked where there is no GPU."""
    for item in items:
        if _GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # seconds; only when there is something to decide

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))
