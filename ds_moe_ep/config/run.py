"""The configuration of a run: a folder of `ds-moe-ep config`, or a DeepSpeed inference JSON.

It checks what is written against what this package runs; writing the files is bundle.py's work.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from ds_moe_ep.config.deepspeed import DS_INFERENCE_JSON, dtype_name
from ds_moe_ep.config.plan_file import PLAN_JSON, PlanFile
from ds_moe_ep.config.strict import Strict, parse, read_json
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "MONITOR_SECTIONS",
    "UNSUPPORTED_SETTINGS",
    "InferenceSettings",
    "RunConfig",
    "load_run_config",
    "read_monitor",
]

MONITOR_SECTIONS = frozenset({"comet", "csv_monitor", "tensorboard", "wandb"})
"""What DeepSpeed's monitor reads of a DeepSpeed JSON (0.19.8, deepspeed/monitor/config.py)."""

# What DeepSpeedInferenceConfig (0.19.8) takes but this package gives no meaning: kernels for other
# models, tensor parallelism, DeepSpeed's own checkpoint loading, deprecated spellings.
UNSUPPORTED_SETTINGS = frozenset(
    """args base_dir checkpoint checkpoint_config ckpt_config config enable_cuda_graph ep_group
    ep_mp_group ep_size expert_group expert_mp_group injection_dict injection_policy
    injection_policy_tuple keep_module_on_host moe_experts moe_type mp_size mpu quant replace_method
    return_tuple save_mp_checkpoint_path set_empty_params tm training_mp_size transposed_mode
    triangular_masking triton_autotune use_triton zero""".split()
)


def _dtype(text: str) -> str:
    try:
        return dtype_name(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class MoeSettings(Strict):
    """DeepSpeed's `moe` section; `num_experts` is a list with the experts of one layer."""

    enabled: Literal[True] = True
    ep_size: PositiveInt = 1
    moe_experts: list[PositiveInt] = Field(default=[], alias="num_experts")
    type: Literal["standard"] = "standard"


class TensorParallelSettings(Strict):
    """DeepSpeed's `tensor_parallel` section; dense weights are whole on every rank here."""

    enabled: bool = True
    tp_size: Literal[1] = 1


class InferenceSettings(Strict):
    """What is supported of `DeepSpeedInferenceConfig`, by DeepSpeed's names and aliases.

    The defaults are DeepSpeed's; what a file leaves out is left out of `RunConfig.inference` too.
    """

    dtype: Annotated[str, AfterValidator(_dtype)] = "float16"
    tensor_parallel: TensorParallelSettings = Field(default=TensorParallelSettings(), alias="tp")
    moe: MoeSettings = MoeSettings()
    replace_with_kernel_inject: Literal[False] = Field(default=False, alias="kernel_inject")
    max_out_tokens: PositiveInt = Field(default=1024, alias="max_tokens")
    min_out_tokens: PositiveInt = Field(default=1, alias="min_tokens")


@dataclass(frozen=True)
class RunConfig:
    """What a run was configured to do; what was not written is left open.

    Attributes:
        source: the folder or file it was read from.
        plan: the plan of the folder; None for a bare DeepSpeed JSON, which knows no number of GPUs.
        num_experts: routed experts of a layer of the model it was made for, or None.
        inference: the configuration for `deepspeed.init_inference`, under DeepSpeed's full names.
        monitor: the sections for DeepSpeed's monitor that are enabled, by name.
    """

    source: Path
    plan: ParallelPlan | None
    num_experts: int | None
    inference: dict[str, Any]
    monitor: dict[str, Any] = field(default_factory=dict)

    @property
    def ep_size(self) -> int | None:
        """Ranks that an expert layer is spread over, or None."""
        size: int | None = self.inference.get("moe", {}).get("ep_size")
        return size

    @property
    def dtype(self) -> str | None:
        """The type to run in, bfloat16, float16 or float32, or None."""
        name: str | None = self.inference.get("dtype")
        return name


def load_run_config(path: Path) -> RunConfig:
    """Read the `--config` of launch/infer.py.

    Args:
        path: a folder that `ds-moe-ep config` wrote, or a DeepSpeed inference JSON.

    Raises:
        ConfigError: if a file is missing or malformed, a setting is unknown or not supported, or
            the files of a folder disagree.
    """
    return _load_folder(path) if path.is_dir() else _load_json(path)


def read_monitor(path: Path) -> dict[str, Any]:
    """Read the enabled sections for DeepSpeed's monitor of any DeepSpeed JSON.

    Raises:
        ConfigError: if the file is missing or malformed, or has no such section.
    """
    sections = _take_monitor(read_json(path), path)
    if not sections:
        raise ConfigError(
            f"{path}: none of {', '.join(sorted(MONITOR_SECTIONS))} is enabled there. Name a "
            f"DeepSpeed JSON that sets up DeepSpeed's monitor."
        )
    return sections


def _load_json(path: Path) -> RunConfig:
    content = read_json(path)
    unsupported = sorted(UNSUPPORTED_SETTINGS & content.keys())
    if unsupported:
        raise ConfigError(
            f"{path}: {', '.join(unsupported)}: DeepSpeed has this setting, but expert-parallel "
            f"inference does not support it. Remove it."
        )
    monitor = _take_monitor(content, path)
    settings = parse(InferenceSettings, content, path)
    counts = set(settings.moe.moe_experts)
    if len(counts) > 1:
        raise ConfigError(
            f"{path}: moe.num_experts={settings.moe.moe_experts}: every MoE layer must have the "
            f"same number of experts. Give one number, like [64]."
        )
    inference = settings.model_dump(exclude_unset=True)
    return RunConfig(path, None, counts.pop() if counts else None, inference, monitor)


def _take_monitor(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Takes the sections for DeepSpeed's monitor out: `deepspeed.init_inference` refuses them."""
    enabled = {}
    for name in MONITOR_SECTIONS & content.keys():
        section = content.pop(name)
        if not isinstance(section, dict) or not isinstance(section.get("enabled", False), bool):
            raise ConfigError(
                f"{path}: {name}={section!r}: DeepSpeed's monitor takes a section like "
                f'{{"enabled": true, ...}} here.'
            )
        if section.get("enabled"):
            enabled[name] = section
    return dict(sorted(enabled.items()))


def _load_folder(folder: Path) -> RunConfig:
    command = f"ds-moe-ep config --model M --hostfile H --out {shlex.quote(str(folder))}"
    again = f"Write it again: {command}"
    for name in (PLAN_JSON, DS_INFERENCE_JSON):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder}: no {name} in this folder, so launch/infer.py cannot run it (plans "
                f"with tp_size or pp_size over 1 are for Megatron only). {again}"
            )
    plan_file = parse(PlanFile, read_json(folder / PLAN_JSON), folder / PLAN_JSON)
    plan = plan_file.to_plan()
    run = _load_json(folder / DS_INFERENCE_JSON)
    for name, written, planned in (
        ("world_size", plan_file.plan.world_size, plan.world_size),
        ("ep_size", run.ep_size, plan.ep_size),
        ("tp_size", 1, plan.tp_size),
        ("pp_size", 1, plan.pp_size),
        ("num_experts", run.num_experts, plan_file.model.num_experts),
    ):
        if written != planned:
            raise ConfigError(
                f"{folder}: the files of this folder disagree: {name}={written}, but {PLAN_JSON} "
                f"plans {plan} for {name}={planned}. {again}"
            )
    return RunConfig(folder, plan, run.num_experts, run.inference, run.monitor)
