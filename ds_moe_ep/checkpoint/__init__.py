"""Reads of a checkpoint what one rank needs; writes, converts and checks expert-sharded ones.

What loads a model is imported when it is asked for: checking a checkpoint does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_moe_ep.checkpoint.load import load_expert_parallel_model

__all__ = ["load_expert_parallel_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_moe_ep.checkpoint import load

    return getattr(load, name)
