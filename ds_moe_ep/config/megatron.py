"""megatron.args: the command line that describes a model and a plan to Megatron-LM.

How the plan is said, and the file, are here; the model is mapped in megatron_model.py. Data,
tokenizer, checkpoint and optimizer are the user's part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config.megatron_model import Args, TransformerImpl, model_arguments
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import ParallelPlan

__all__ = ["MEGATRON_ARGS", "MegatronOptions", "megatron_args"]

MEGATRON_ARGS = "megatron.args"

_HEADER = """\
# Written by `ds-moe-ep config` for Megatron-LM (argument names of megatron-core 0.19):
#   pretrain_gpt.py $(grep -v '^#' megatron.args) [data, tokenizer, checkpoint, optimizer]
# and for what Megatron itself says of it, on any machine:
#   ds-moe-ep megatron check --args megatron.args --world {world}
# {plan} is, in Megatron's words: expert model parallel {ep}, data parallel {dense_dp} (replicas of
# the dense weights, each with its own part of the batch), expert data parallel {dp} (copies of each
# expert).
"""

_OWN_LAYERS_NOTE = """\
# {why}
# --spec names layers of this package that do; it has to be importable where Megatron runs. Compared
# with Hugging Face as local layers; with those of Transformer Engine they were not run yet.
"""

_WHY_OWN_LAYERS = {
    "olmoe_layers": "OLMoE normalises q and k over all heads together, --qk-layernorm each head.",
    "mla_layers": "Megatron has no layers that compute this latent attention (docs/megatron.md).",
}


@dataclass(frozen=True)
class MegatronOptions:
    """How Megatron is to compute the model.

    Attributes:
        transformer_impl: whose layers it uses: Transformer Engine's, or its own.
        grouped_gemm: whether a rank computes its experts in one multiplication.

    Raises:
        ConfigError: if they contradict each other.
    """

    transformer_impl: TransformerImpl = "transformer_engine"
    grouped_gemm: bool = False

    def __post_init__(self) -> None:
        if self.grouped_gemm and self.transformer_impl == "local":
            raise ConfigError(
                "--megatron-grouped-gemm with --megatron-transformer-impl local: Megatron's own "
                "layers compute one expert after the other. Use transformer_engine for it."
            )


def megatron_args(
    plan: ParallelPlan,
    spec: ModelSpec,
    config: Mapping[str, Any],
    options: MegatronOptions = MegatronOptions(),
) -> str:
    """Return the text of the argument file.

    Args:
        plan: sizes; tensor and pipeline parallelism are allowed here.
        spec: the model.
        config: its config.json, for what does not change sizes and so is not in `spec`.
        options: how Megatron is to compute it.

    Raises:
        ConfigError: if the family has no checked mapping, or Megatron computes something else than
            Hugging Face for a value in `config`.
    """
    arguments = {
        **_parallelism(plan, spec, options),
        **model_arguments(spec, config, transformer_impl=options.transformer_impl),
        "--moe-grouped-gemm": options.grouped_gemm,
    }
    lines = (
        name if value is True else f"{name} {value}"
        for name, value in arguments.items()
        if value is not None and value is not False
    )
    return _header(plan, arguments) + "".join(f"{line}\n" for line in lines)


def _header(plan: ParallelPlan, arguments: Args) -> str:
    text = _HEADER.format(
        plan=plan,
        ep=plan.ep_size,
        dense_dp=plan.dense_dp_size,
        dp=plan.dp_size,
        world=plan.world_size,
    )
    own_layers = arguments["--spec"]
    if own_layers:
        text += _OWN_LAYERS_NOTE.format(why=_WHY_OWN_LAYERS[str(own_layers).split()[1]])
    return text


def _parallelism(plan: ParallelPlan, spec: ModelSpec, options: MegatronOptions) -> Args:
    for size, value, field in (
        ("pp_size", plan.pp_size, "num_layers"),
        ("tp_size", plan.tp_size, "vocab_size"),
    ):
        if getattr(spec, field) % value:
            raise ConfigError(
                f"{size}={value} does not divide {field}={getattr(spec, field)}: Megatron gives "
                f"every rank as much. Use a --{size[:2]} that does."
            )
    if plan.tp_size > 1 and spec.model_type == "olmoe":
        raise ConfigError(
            f"tp_size={plan.tp_size}: OLMoE's norms of q and k span all heads, which Megatron "
            "would spread over ranks. Use --tp 1."
        )
    if plan.tp_size > 1 and options.transformer_impl == "local":
        raise ConfigError(
            f"tp_size={plan.tp_size} with --megatron-transformer-impl local: where tensors are "
            "split, experts need sequence parallelism, which Megatron's own RMSNorm does not do. "
            "Use transformer_engine, or --tp 1."
        )
    return {
        "--tensor-model-parallel-size": plan.tp_size,
        "--pipeline-model-parallel-size": plan.pp_size,
        "--expert-model-parallel-size": plan.ep_size,
        # An expert is split as every other tensor is; a size of 1 would keep it whole on each rank.
        "--expert-tensor-parallel-size": plan.tp_size,
        # Megatron's MoE layer asks for it wherever tensors are split.
        "--sequence-parallel": plan.tp_size > 1,
    }
