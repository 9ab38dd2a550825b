"""The adapted model against Hugging Face itself, family by family, from router to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from ds_moe_ep.adapter import shard_experts
from ds_moe_ep.model_families import UNSUPPORTED
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.experts import expert_parameters
from tests.helpers import run_ranks
from tests.helpers.families import (
    CORE_FAMILIES,
    FAMILIES,
    UNKNOWN_FAMILIES,
    VOCAB_SIZE,
    auto_class,
    save_tiny,
)
from tests.helpers.families.features import features
from tests.helpers.launch import REPO
from tests.helpers.models_doc import FamilyResult, render_models_doc

WORLD_SIZES = (1, 2, 4)
NEW_TOKENS = 6
# Uneven on purpose: with 4 ranks one of them has no prompt.
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))
    for length in (5, 11, 2)
]
FP32 = {"rtol": 1e-5, "atol": 1e-6}


def observe(
    model: PreTrainedModel, moe_blocks: Sequence[str], prompt: Tensor, generate: Any
) -> dict[str, Any]:
    """Runs one prompt; returns what routers, MoE blocks and head gave, and the greedy tokens."""
    seen: dict[str, Any] = {}

    def keep(name: str):
        return lambda module, args, output: seen.__setitem__(name, output)

    watched = [
        child
        for block in moe_blocks
        for child in (block, f"{block}.{_router_name(model.get_submodule(block))}")
    ]
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    with torch.no_grad():
        seen["logits"] = model(input_ids=prompt).logits
    for hook in hooks:
        hook.remove()
    seen["tokens"] = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return seen


def _router_name(block: torch.nn.Module) -> str:
    (name,) = (name for name, _ in block.named_children() if name in ("gate", "router"))
    return name


def run_families(
    rank: int, world_size: int, folders: dict[str, Path]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Loads every family with the experts of this rank and observes every world_size-th prompt."""
    from ds_moe_ep.adapter import bind_expert_groups, moe_layers
    from ds_moe_ep.checkpoint import load_expert_parallel_model
    from ds_moe_ep.config.deepspeed import inference_config
    from ds_moe_ep.dist.groups import RankInfo, init_distributed
    from ds_moe_ep.engine.loading import init_inference
    from ds_moe_ep.engine.sync import ForwardSync
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.plan import ParallelPlan

    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    observed: dict[str, dict[int, dict[str, Any]]] = {}
    for family, folder in folders.items():
        plan, spec = ParallelPlan(ep_size=world_size), read_model_spec(folder)
        model, report = load_expert_parallel_model(folder, plan, ep_rank=rank)
        bind_expert_groups(model)
        engine = init_inference(model, inference_config(plan, spec, dtype="float32"))
        layers = moe_layers(model)
        sync = ForwardSync(
            model,
            layers,
            torch.distributed.group.WORLD,
            top_k=spec.top_k,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        blocks = [layer.name.rpartition(".")[0] for layer in report.layers]
        observed[family] = {
            index: observe(model, blocks, PROMPTS[index], engine.generate)
            for index in range(rank, len(PROMPTS), world_size)
        }
        sync.join_others()
    return observed


@dataclass(frozen=True)
class Reference:
    """What Hugging Face's model is and gives for each prompt."""

    model: PreTrainedModel
    experts: list[str]
    seen: list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def references(folders) -> dict[str, Reference]:
    """One for each family that a test asked for, kept for the other ep_sizes."""
    return {}


@pytest.fixture(scope="module")
def results() -> dict[str, FamilyResult]:
    """What the tests of this module saw, for docs/models.md."""
    return {}


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"ep{size}")
def observed(request, folders, tmp_path_factory) -> list[dict[str, dict[int, dict[str, Any]]]]:
    """What each rank saw: one job for all families, because starting ranks is what costs time."""
    return run_ranks(
        run_families, request.param, tmp_path_factory.mktemp("parity"), folders, timeout_s=400
    )


def _reference(folder: Path) -> Reference:
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32)
    experts = [name for name, module in model.named_modules() if hasattr(module, "_apply_gate")]
    blocks = [name.rpartition(".")[0] for name in experts]
    seen = [observe(model, blocks, prompt, model.generate) for prompt in PROMPTS]
    return Reference(model, experts, seen)


def _scale(value: Any) -> float:
    """Returns the largest absolute value, at least 1: what float32's noise is relative to.

    Ranks sum the outputs of experts in another order than one process, and large summands that
    cancel leave the noise of their size in a small sum.
    """
    if isinstance(value, Tensor):
        return max(1.0, float(value.abs().max()))
    return max(map(_scale, value)) if isinstance(value, tuple | list) else 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_model_equals_hugging_face(
    observed, folders, references, results, family: str
) -> None:
    if family not in references:
        references[family] = _reference(folders[family])
    reference = references[family]
    assert reference.experts
    by_prompt = {index: seen for rank in observed for index, seen in rank[family].items()}
    assert sorted(by_prompt) == list(range(len(PROMPTS)))
    for index, actual in by_prompt.items():
        expected = dict(reference.seen[index])
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual.pop("tokens"), expected.pop("tokens"), rtol=0, atol=0)
        for name, wanted in expected.items():
            scale = 1.0 if family in CORE_FAMILIES else _scale(wanted)
            torch.testing.assert_close(
                actual[name],
                wanted,
                rtol=FP32["rtol"],
                atol=FP32["atol"] * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    spec = read_model_spec(folders[family])
    result = results.setdefault(
        family,
        FamilyResult(
            family=type(reference.model.config).__module__.split(".")[-2],
            architecture=type(reference.model).__name__,
            features=features(
                reference.model, reference.model.get_submodule(reference.experts[0]), spec
            ),
            params_are_exact=spec.params_are_exact,
            passed=set(),
        ),
    )
    result.passed.add(len(observed))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_tells_what_the_model_is(folders, family: str) -> None:
    config = AutoConfig.from_pretrained(folders[family])
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    num_params = sum(param.numel() for param in model.parameters())
    layers = shard_experts(model, 1, ep_rank=0)
    experts = [model.get_submodule(layer.name) for layer in layers]
    spec = read_model_spec(folders[family])

    numbers = [[int(part) for part in layer.name.split(".") if part.isdigit()] for layer in layers]
    assert spec.moe_layers == tuple(number for (number,) in numbers)
    assert {spec.num_experts} == {layer.num_experts for layer in layers}
    assert spec.num_expert_params == sum(
        param.numel() for module in experts for param in expert_parameters(module).values()
    )
    if spec.params_are_exact:
        assert spec.num_params == num_params


def test_every_family_of_transformers_is_here() -> None:
    """Whatever generates text and has experts that transformers itself can spread is listed."""
    listed = {*FAMILIES, *UNSUPPORTED}
    models = Path(find_spec("transformers").origin).parent / "models"
    missing = set()
    for file in models.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        configs = "".join(
            config.read_text(encoding="utf-8") for config in file.parent.glob("configuration_*.py")
        )
        if "@use_experts_implementation" not in text and "ep_dispatch_experts" not in configs:
            continue
        if not listed & _model_types(file.parent.name):
            missing.add(file.parent.name)
    assert not missing


def _model_types(folder: str) -> set[str]:
    return {
        model_type
        for model_type, config in CONFIG_MAPPING.items()
        if config.__module__.split(".")[-2] == folder
    }


def test_the_table_of_models_is_what_this_run_saw(request, results) -> None:
    """Runs last; a run of some families only cannot tell."""
    if UNKNOWN_FAMILIES:
        pytest.skip(f"this transformers has no {', '.join(UNKNOWN_FAMILIES)}")
    if not request.config.option.keyword and results.keys() == FAMILIES.keys():
        page = render_models_doc(results, **FP32)
        file = REPO / "docs" / "models.md"
        if request.config.getoption("--write-models-doc"):
            file.write_text(page, encoding="utf-8")
        assert file.read_text(encoding="utf-8") == page, (
            "docs/models.md is not what this run saw: pytest tests/parity --write-models-doc"
        )
    else:
        pytest.skip("only some of the families ran")
