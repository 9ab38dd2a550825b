"""What is converted: a model's folder, opened, with the model that its config describes.

All that can be wrong with its weights is found here, before anything is written. Where their bytes
go is decided in layout.py and deepspeed_layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ds_moe_ep.adapter.replace import SwappedLayer, check_ep_size, shard_experts
from ds_moe_ep.checkpoint.files import CheckpointFiles, open_checkpoint
from ds_moe_ep.checkpoint.header import joined_shape
from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config, refuse_incomplete
from ds_moe_ep.checkpoint.mapping import ExpertTensor, check_experts, expert_tensors

__all__ = ["Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A model that is to be converted.

    Attributes:
        files: Its tensors.
        model: The model that config.json describes, on the meta device.
    """

    files: CheckpointFiles
    model: PreTrainedModel

    @cached_property
    def layers(self) -> list[SwappedLayer]:
        """The layers with experts, in the order in which the model has them.

        Raises:
            AdapterError: There are none.
        """
        return shard_experts(self.model, ep_size=1, ep_rank=0)

    def find_experts(self, ep_size: int = 1) -> dict[str, ExpertTensor]:
        """Returns which tensors hold experts, by name, after all tensors were checked.

        Args:
            ep_size: Into how many equal parts the experts are to go.

        Raises:
            AdapterError: The model has no experts, or they cannot be divided like that.
            CheckpointError: Tensors are missing, not the model's or of the wrong shape.
        """
        for layer in self.layers:
            check_ep_size(layer.name, layer.num_experts, ep_size)
        found = expert_tensors(self.model, self.files, self.layers)
        check_experts(found, (layer.name for layer in self.layers))
        self.check_tensors()
        return found

    def check_tensors(self) -> None:
        """Compares all tensors with the model, by loading them as transformers would, but empty.

        Raises:
            CheckpointError: Tensors are missing, not the model's or of the wrong shape.
        """
        shapes = {key: joined_shape(pieces) for key, pieces in self.files.tensors.items()}
        mapping = get_model_conversion_mapping(self.model)
        for rule in mapping:
            if getattr(rule, "force_cpu", False):  # for large tensors, but these are empty
                rule.force_cpu = False
        settings = LoadStateDictConfig(
            device_map={"": "meta"},
            weight_mapping=mapping,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            {key: torch.empty(shape, device="meta") for key, shape in shapes.items()},
            settings,
        )
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self.model._adjust_missing_and_unexpected_keys(info)
        refuse_incomplete(self.files.folder, info)


def open_source(
    folder: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Source:
    """Opens a Hugging Face directory or an expert-sharded checkpoint.

    Its model is built without memory.

    Args:
        folder: The directory.
        allow_pickle: See `files.open_checkpoint`.
        trust_remote_code: See `load.read_model_config`.

    Raises:
        AdapterError: The model cannot be built or supported.
        CheckpointError: The source is not whole.
    """
    # First, as it tells a folder of another format for what it is, whether it has a config or not.
    files = open_checkpoint(folder, allow_pickle=allow_pickle)
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    return Source(files, build_on_meta(config, torch.float32))
