"""Imports megatron-core where it would not import, and lets it run on a machine without a GPU.

Everything put in the place of something else is listed here, and is there only as long as the
context that put it there. A model that runs on a GPU has nothing replaced; one built on the meta
device, as `ds-moe-ep megatron check` does, has it everywhere, since it must not touch a GPU. What
megatron-core computes is not touched.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ds_moe_ep.errors import MegatronError

__all__ = ["INSTALL", "import_megatron", "megatron_stand_ins"]

INSTALL = "pip install --no-deps --ignore-requires-python megatron-core==0.19.2"
"""For Python 3.11 or newer: of 3.12 it needs one name (`import_megatron`), and there are no wheels
for 3.10. Of packages it needs torch, numpy and packaging only."""

# Whatever these import in turn is imported with them.
_ENTRY_POINTS = (
    "megatron.training.arguments",
    "megatron.training.checkpointing",
    "megatron.training.models.gpt",
    "megatron.core.dist_checkpointing",
)


def import_megatron() -> None:
    """Imports what this package uses of megatron-core.

    Some things are put in place while it is imported: `typing.override`, which Python has from 3.12
    on; a triton whose kernels cannot be called, which a torch for CPUs does not bring; and, without
    a GPU, a `torch.compile` that leaves Megatron's functions as they are written.

    Raises:
        MegatronError: It is not installed, or does not import.
    """
    if not (_has("megatron") and _has("megatron.training")):
        raise MegatronError(
            "megatron-core 0.17 or newer is not installed. To have it, with Python 3.11 or newer: "
            f"{INSTALL}"
        )
    import torch

    with contextlib.ExitStack() as stack:
        if not hasattr(typing, "override"):
            typing_extensions = importlib.import_module("typing_extensions")
            stack.enter_context(_attribute(typing, "override", typing_extensions.override))
        if not torch.cuda.is_available():
            stack.enter_context(_attribute(torch, "compile", _decorate))
        if not _has("triton"):
            stack.enter_context(_no_triton())
        # That Transformer Engine and apex are not there is not news.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for name in _ENTRY_POINTS:
                importlib.import_module(name)
        except ImportError as error:
            raise MegatronError(
                f"megatron-core does not import ({error}). Tested is 0.19.2: {INSTALL}"
            ) from error


@contextlib.contextmanager
def megatron_stand_ins(device: str | None = None) -> Iterator[None]:
    """Imports megatron-core; while the context lasts, it runs without a GPU.

    Args:
        device: What takes the place of the current CUDA device: "cpu", or "meta" for a model
            without memory. By default "cpu" where there is no GPU; where there is one, it is used
            and nothing is replaced once megatron-core is imported.

    Raises:
        MegatronError: As `import_megatron`.
    """
    import torch

    import_megatron()
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    with contextlib.ExitStack() as stack:
        if device is not None:
            for owner, name, value in (*_cuda(device), *_own_of_megatron()):
                stack.enter_context(_attribute(owner, name, value))
        yield


def _cuda(device: str) -> Iterator[tuple[Any, str, object]]:
    """Yields what stands in for parts of torch.cuda: owner, name and value."""
    import torch

    yield torch.cuda, "current_device", lambda: device
    # Asked for by the validation of arguments; the plan is for GPUs of the Hopper generation.
    yield torch.cuda, "get_device_capability", lambda *args: (9, 0)
    yield torch.cuda, "get_device_properties", lambda *args: types.SimpleNamespace(major=9, minor=0)
    # Copies to the host are made on a stream of their own. There is but one queue here.
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "Event", _Stream
    yield torch.cuda, "current_stream", _Stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "synchronize", lambda *args: None


def _own_of_megatron() -> Iterator[tuple[Any, str, object]]:
    """Yields what stands in for functions of megatron-core that take the GPU for granted."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.training import checkpointing

    # Leaves tensors alone that are on the host already, even where a list of sizes is asked for.
    yield moe_utils, "maybe_move_tensor_to_cpu", _on_the_host
    yield token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_host
    # Makes its mask on the device "cuda".
    yield fused_softmax, "get_default_causal_mask", _causal_mask
    # Agrees with the other ranks on the iteration by a tensor on the device "cuda".
    yield checkpointing, "read_metadata", _read_metadata


class _Stream:
    """A CUDA stream or event for work that is done when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def record_event(self, event: object = None) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _causal_mask(sequence_length: int) -> Any:
    import torch

    return torch.ones(sequence_length, sequence_length, dtype=torch.bool).triu(diagonal=1)


def _read_metadata(tracker_filename: str) -> tuple[int, bool]:
    """Returns the iteration of a checkpoint and whether it is a release, which has none."""
    with open(tracker_filename, encoding="utf-8") as file:
        text = file.read().strip()
    return (0, True) if text == "release" else (int(text), False)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Gives an attribute another value for a while."""
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _no_triton() -> Iterator[None]:
    """Lets `import triton` succeed for a while, without torch taking it for the real one."""
    import torch  # noqa: F401
    from torch.utils._triton import has_triton_package

    has_triton_package()  # the answer is kept
    stand_ins = {name: _Kernels(name) for name in ("triton", "triton.language")}
    stand_ins["triton"].language = stand_ins["triton.language"]  # type: ignore[attr-defined]
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)


class _Kernels(types.ModuleType):
    """A triton in which kernels can be defined. Its version is one that Megatron does not use."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorate


def _decorate(given: object = None, *args: object, **options: object) -> Any:
    """A decorator that changes nothing, with or without options."""
    return given if callable(given) else _decorate
