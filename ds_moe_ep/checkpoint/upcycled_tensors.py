"""Which tensors an upcycled model consists of, and what each is made of.

Nothing is read or computed here: that happens while they are written (derived.py).
"""

# Shapes: H hidden, I FFN width, E experts

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ds_moe_ep.adapter.ffn import Ffn
from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.architectures import MoeArchitecture
from ds_moe_ep.checkpoint.derived import DerivedTensor, DrawnValues, Noise, changed, torch_dtype
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import ByteRange, Piece, StoredTensor
from ds_moe_ep.checkpoint.layout import ProducedBytes
from ds_moe_ep.checkpoint.mapping import ExpertTensor
from ds_moe_ep.errors import CheckpointError
from ds_moe_ep.moe.upcycled import expert_shapes
from ds_moe_ep.upcycle_settings import UpcycleSettings

__all__ = ["UpcycleRequest", "UpcycledTensors"]


@dataclass(frozen=True)
class UpcycleRequest:
    """What a user asks for.

    Attributes:
        num_experts: Experts of each MoE layer.
        top_k: Experts a token is sent to.
        every: Every how many layers one gets experts: 2 is layers 1, 3, 5 and so on.
        layers: Which layers get experts instead; neither: all.
        method: ``copy``: every expert is the FFN. ``split``: its neurons are spread over them.
        router_std: Standard deviation of the router's weights; 0 for zeros.
        noise: Standard deviation of noise on the experts' tensors, relative to their own.
        seed: What the router and the noise are drawn from.
        ffn_class: Class of the FFNs; by default the only one that is an FFN.
    """

    num_experts: int
    top_k: int
    every: int | None = None
    layers: tuple[int, ...] | None = None
    method: str = "copy"
    router_std: float = 0.02
    noise: float = 0.0
    seed: int = 0
    ffn_class: str | None = None


@dataclass(frozen=True)
class UpcycledTensors:
    """The tensors of an upcycled model, unread: those of the dense one, or made of them.

    Attributes:
        request: What was asked for.
        settings: What the model is made, all checked.
        files: The dense model's weights.
        names: From the names of its parameters to those on disk.
        ffns: The FFNs that become experts.
    """

    request: UpcycleRequest
    settings: UpcycleSettings
    files: CheckpointFiles
    names: Mapping[str, str]
    ffns: list[Ffn]

    def dense(self) -> dict[str, tuple[Piece, ...]]:
        """Returns the tensors that stay what they are."""
        replaced = {self._key(ffn, name) for ffn in self.ffns for name in _parameters(ffn)}
        return {
            key: tuple(pieces) for key, pieces in self.files.tensors.items() if key not in replaced
        }

    def routers(self, name: str) -> dict[str, tuple[Piece, ...]]:
        """Returns the routers' weights ``[E, H]``.

        Args:
            name: Their name, with ``{slot}`` or ``{layer}`` in it.
        """
        made: dict[str, tuple[Piece, ...]] = {}
        for ffn in self.ffns:
            like = self._stored(ffn, f"{ffn.layout.down}.weight")
            shape = (self.settings.num_experts, ffn.hidden_size)
            values = DrawnValues(
                torch_dtype(like),
                shape[0] * shape[1],
                self.request.router_std,
                self.request.seed,
                f"router of layer {ffn.layer}",
            )
            key = name.format(slot=ffn.slot, layer=ffn.layer)
            made[key] = (DerivedTensor(like.dtype, shape, (values,)),)
        return made

    def experts_fused(self) -> tuple[dict[str, tuple[Piece, ...]], dict[str, ExpertTensor]]:
        """Returns the parameters of `UpcycledExperts`, and that they are of all experts."""
        made: dict[str, tuple[Piece, ...]] = {}
        of_experts: dict[str, ExpertTensor] = {}
        num_experts = self.settings.num_experts
        for ffn in self.ffns:
            name = f"{ffn.slot}.experts"
            layer = SwappedLayer(name, "UpcycledExperts", num_experts, range(num_experts))
            width = self.settings.expert_width(ffn.intermediate_size)
            dtype = self._dtype(ffn)
            for parameter, shape in expert_shapes(ffn.layout, ffn.hidden_size, width).items():
                parts = tuple(
                    part
                    for expert in range(num_experts)
                    for part in self._parts(ffn, parameter, expert)
                )
                key = f"{name}.{parameter}"
                made[key] = (DerivedTensor(dtype, (num_experts, *shape), parts),)
                of_experts[key] = ExpertTensor(layer, None)
        return made, of_experts

    def experts_one_by_one(
        self, prefix: str, architecture: MoeArchitecture
    ) -> dict[str, tuple[Piece, ...]]:
        """Returns a tensor for each matrix of each expert, as MoE families have them on disk.

        Args:
            prefix: What their names begin with, with ``{layer}`` in it.
            architecture: The family; FFNs have a gate, and no biases.
        """
        made: dict[str, tuple[Piece, ...]] = {}
        for ffn in self.ffns:
            width, dtype = self.settings.expert_width(ffn.intermediate_size), self._dtype(ffn)
            for expert in range(self.settings.num_experts):
                gate, up = self._parts(ffn, "gate_up_proj", expert)
                (down,) = self._parts(ffn, "down_proj", expert)
                for matrix, part in zip(architecture.matrices, (gate, up, down), strict=True):
                    shape = (ffn.hidden_size, width) if part is down else (width, ffn.hidden_size)
                    key = f"{prefix.format(layer=ffn.layer)}.{expert}.{matrix}.weight"
                    made[key] = (DerivedTensor(dtype, shape, (part,)),)
        return made

    def empty_shared_experts(self, block: str) -> dict[str, tuple[Piece, ...]]:
        """Returns shared experts of width 0, which add nothing, and their gates.

        Args:
            block: Name of an MoE block, with ``{layer}`` in it.
        """
        made: dict[str, tuple[Piece, ...]] = {}
        for ffn in self.ffns:
            like = self._stored(ffn, f"{ffn.layout.down}.weight")
            shapes = {
                "shared_expert.gate_proj": (0, ffn.hidden_size),
                "shared_expert.up_proj": (0, ffn.hidden_size),
                "shared_expert.down_proj": (ffn.hidden_size, 0),
                "shared_expert_gate": (1, ffn.hidden_size),
            }
            for part, shape in shapes.items():
                values = DrawnValues(torch_dtype(like), shape[0] * shape[1])
                key = f"{block.format(layer=ffn.layer)}.{part}.weight"
                made[key] = (DerivedTensor(like.dtype, shape, (values,)),)
        return made

    def _parts(self, ffn: Ffn, parameter: str, expert: int) -> Iterator[ByteRange | ProducedBytes]:
        """Yields what one expert's part of a parameter of `UpcycledExperts` is made of."""
        suffix = "bias" if parameter.endswith("_bias") else "weight"
        if parameter.startswith("down_proj"):
            yield self._down(ffn, suffix, expert)
            return
        for name in ffn.layout.up:
            stored = self._stored(ffn, f"{name}.{suffix}")
            # A fused matrix has the gate's neurons first, then as many of up.
            is_fused = ffn.layout.has_gate and len(ffn.layout.up) == 1
            for begin in (0, ffn.intermediate_size) if is_fused else (0,):
                own = self._neurons(ffn, expert)
                taken = range(begin + own.start, begin + own.stop)
                noise = self._noise(f"{name}.{suffix} from {begin}", ffn, expert)
                if ffn.layout.is_transposed and suffix == "weight":
                    yield changed(stored, columns=taken, noise=noise)
                else:
                    yield changed(stored, rows=taken, noise=noise)

    def _down(self, ffn: Ffn, suffix: str, expert: int) -> ByteRange | ProducedBytes:
        stored = self._stored(ffn, f"{ffn.layout.down}.{suffix}")
        noise = self._noise(f"{ffn.layout.down}.{suffix}", ffn, expert)
        # With equal weights that sum to 1 every expert adds the bias once over E times.
        if self.settings.method == "copy" or suffix == "bias":
            return changed(stored, noise=noise)
        taken = self._neurons(ffn, expert)
        # The FFN is the sum of its parts, the MoE layer their weighted mean: hence the factor.
        scale = float(self.settings.num_experts)
        if ffn.layout.is_transposed:
            return changed(stored, rows=taken, scale=scale, noise=noise)
        return changed(stored, columns=taken, scale=scale, noise=noise)

    def _neurons(self, ffn: Ffn, expert: int) -> range:
        """Returns which neurons of the FFN an expert has."""
        if self.settings.method == "copy":
            return range(ffn.intermediate_size)
        width = self.settings.expert_width(ffn.intermediate_size)
        return range(expert * width, (expert + 1) * width)

    def _noise(self, tensor: str, ffn: Ffn, expert: int) -> Noise | None:
        if not self.request.noise:
            return None
        stream = f"{tensor} of expert {expert} of layer {ffn.layer}"
        return Noise(self.request.noise, self.request.seed, stream)

    def _dtype(self, ffn: Ffn) -> str:
        """Returns the type of an FFN's tensors."""
        found = sorted({self._stored(ffn, name).dtype for name in _parameters(ffn)})
        if len(found) > 1:
            raise CheckpointError(
                f"{self.files.folder}: the tensors of {ffn.name} are of {len(found)} types, "
                f"{', '.join(found)}. Save the model in one."
            )
        return found[0]

    def _key(self, ffn: Ffn, parameter: str) -> str:
        return self.names[f"{ffn.name}.{parameter}"]

    def _stored(self, ffn: Ffn, parameter: str) -> StoredTensor:
        key = self._key(ffn, parameter)
        (stored,) = self.files.tensors[key]
        wanted = tuple(ffn.module.get_parameter(parameter).shape)
        if stored.shape != wanted:
            raise CheckpointError(
                f"{self.files.folder}: {key} is {list(stored.shape)} on disk, but the model makes "
                f"{list(wanted)} of it. Load the model with transformers and save it again first."
            )
        return stored


def _parameters(ffn: Ffn) -> list[str]:
    """Returns the names of an FFN's parameters within its module."""
    suffixes = ("weight", "bias") if ffn.layout.has_bias else ("weight",)
    return [f"{name}.{suffix}" for name in (*ffn.layout.up, ffn.layout.down) for suffix in suffixes]
