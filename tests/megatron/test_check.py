"""`ds-moe-ep megatron check`: what Megatron takes, what it refuses and where, what it overlooks."""

import argparse
import json
import time

import pytest

from ds_moe_ep.cli import main
from ds_moe_ep.config.megatron import MegatronOptions, megatron_args
from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.arguments import read_arguments
from ds_moe_ep.megatron.check import check_arguments
from ds_moe_ep.megatron.check_report import OWN_CHECKS, STAGES, GroupSizes
from ds_moe_ep.model_spec import model_spec_from_config, read_model_spec
from ds_moe_ep.placement import make_placement
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.launch import REPO
from tests.unit.test_config_megatron import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    FAMILIES,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
)

EP64 = ParallelPlan(ep_size=64)
OLMOE_ARGS = REPO / "configs" / "olmoe-1b-7b-ep64" / "megatron.args"


def spec_of(config):
    return model_spec_from_config(config, source="config.json", name="model")


@pytest.fixture
def write(tmp_path):
    """`write(config, plan, changes)` returns an argument file; a value of None takes one out."""

    def written(config, plan=EP64, changes=None, **options):
        text = megatron_args(plan, spec_of(config), config, MegatronOptions(**options))
        lines = [line for line in text.splitlines() if line.split()[0] not in (changes or {})]
        lines += [f"{name} {value}" for name, value in (changes or {}).items() if value is not None]
        (tmp_path / "megatron.args").write_text("\n".join(lines))
        return tmp_path / "megatron.args"

    return written


@pytest.mark.parametrize("config", [*FAMILIES, DEEPSEEK_V2_LITE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("options", [{}, {"grouped_gemm": True}, {"transformer_impl": "local"}])
def test_megatrons_parser_has_every_name(config, options, write):
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    words = read_arguments(write(config, **options))
    names = {word for word in words if word.startswith("--")}
    assert len(names) > 25
    assert not names - parser._option_string_actions.keys()


@pytest.mark.parametrize(
    ("config", "plan", "options"),
    [
        (MIXTRAL, EP64, {}),
        (MIXTRAL, ParallelPlan(ep_size=8, tp_size=2, pp_size=2, dp_size=2), {}),
        (QWEN2_MOE, EP64, {"transformer_impl": "local"}),
        (QWEN2_MOE, ParallelPlan(ep_size=16, pp_size=2), {}),
        (QWEN3_MOE, ParallelPlan(ep_size=16, tp_size=4), {"grouped_gemm": True}),
        (DEEPSEEK_V2, EP64, {}),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else str(value),
)
def test_all_ranks_pass_and_experts_lie_where_the_plan_says(config, plan, options, write):
    spec = spec_of(config)
    report = check_arguments(write(config, plan, **options), plan.world_size)
    assert report.problems == {} and report.not_reached == ()
    assert report.sizes == GroupSizes(
        tensor_parallel=plan.tp_size,
        pipeline_parallel=plan.pp_size,
        data_parallel=plan.dense_dp_size,
        expert_parallel=plan.ep_size,
        expert_tensor_parallel=plan.tp_size,
        expert_data_parallel=plan.dp_size,
    )
    placement = make_placement(plan, spec)
    layers_per_stage = spec.num_layers // plan.pp_size
    for rank, part in zip(range(plan.world_size), report.ranks, strict=True):
        at = plan.coordinates(rank)
        own = range(at.pp_rank * layers_per_stage, (at.pp_rank + 1) * layers_per_stage)
        assert part.rank == rank
        assert part.experts == {
            layer: tuple(
                expert
                for expert in range(spec.num_experts)
                if placement.owner(layer, expert) == at.ep_rank
            )
            for layer in spec.moe_layers
            if layer in own
        }
        if plan.tp_size == plan.pp_size == 1:
            share = spec.num_expert_params // plan.ep_size
            assert (part.dense_params, part.expert_params) == (spec.num_dense_params, share)


COMMITTED = sorted(path.parent.name for path in REPO.glob("configs/*/megatron.args"))


@pytest.mark.parametrize("name", COMMITTED)
def test_all_64_ranks_of_committed_arguments_in_a_minute(name):
    folder = REPO / "configs" / name
    began_s = time.process_time()
    report = check_arguments(folder / "megatron.args", 64)
    assert time.process_time() - began_s < 60
    assert report.problems == {} and report.not_reached == ()
    spec = read_model_spec(folder)
    placement = make_placement(EP64, spec)
    own = {layer: {rank: [] for rank in range(64)} for layer in spec.moe_layers}
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            own[layer][placement.owner(layer, expert)].append(expert)
    assert [part.rank for part in report.ranks] == list(range(64))
    for part in report.ranks:
        assert part.experts == {layer: tuple(own[layer][part.rank]) for layer in own}
        assert part.dense_params == spec.num_dense_params
        assert part.expert_params == spec.num_expert_params // 64


def test_what_the_command_says_of_the_committed_olmoe(capsys):
    assert main(["megatron", "check", "--args", str(OLMOE_ARGS), "--world", "64"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line.split()[-1] for line in lines[:6]] == ["pass"] * 6
    assert lines[7] == (
        "Groups of 64 ranks: tensor parallel 1, pipeline parallel 1, data parallel 64, "
        "expert parallel 64, expert tensor parallel 1, expert data parallel 1"
    )
    # The plan's 953,421,824 bytes of dense weights; three matrices of 2048 x 1024 in 16 layers.
    dense, expert = f"{953_421_824 // 2:,}", f"{16 * 3 * 2048 * 1024:,}"
    assert [line.split() for line in lines[10:]] == [
        [str(rank), dense, expert, str(rank), "of", "layers", "0-15"] for rank in range(64)
    ]


def test_the_plan_that_started_this_project(write, tmp_path, capsys):
    model = REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json"
    command = ["config", "--model", str(model), "--out", str(tmp_path / "out"), "--num-gpus", "64"]
    # We refuse it before anything is written.
    assert main([*command, "--ep", "64", "--tp", "16", "--pp", "4", "--dp", "4"]) == 2
    assert "EP64 TP16 PP4 DP4 needs 64 * 16 * 4 * 4 = 16,384 GPUs" in capsys.readouterr().err

    # Megatron has no word for DP, and without it lets three stages pass.
    given = write(OLMOE, changes={"--data-parallel-size": 4})
    report = check_arguments(given, 64)
    assert report.problems == {
        "parse_args": "error: unrecognized arguments: --data-parallel-size 4"
    }
    assert report.not_reached == STAGES[1:]
    split = {
        "--tensor-model-parallel-size": 16,
        "--pipeline-model-parallel-size": 4,
        "--expert-tensor-parallel-size": 16,
        "--sequence-parallel": "",
    }
    report = check_arguments(write(OLMOE, changes=split), 64)
    assert list(report.problems) == [OWN_CHECKS, "initialize_model_parallel"]
    assert report.problems[OWN_CHECKS] == (
        "--expert-model-parallel-size 64 * --expert-tensor-parallel-size 16 * "
        "--pipeline-model-parallel-size 4 = 4,096 does not divide 64 ranks. "
        "With the other sizes as they are, use --expert-model-parallel-size in [1]."
    )
    assert report.problems["initialize_model_parallel"] == (
        "RuntimeError: world_size (64) is not divisible by "
        "expert_tensor_model_pipeline_parallel size (4096)"
    )
    assert report.not_reached == ("GPTModel",)


@pytest.mark.parametrize(
    ("config", "changes", "own", "megatrons"),
    [
        (
            OLMOE,
            {"--moe-router-topk": 65},
            "--moe-router-topk 65 is more than --num-experts 64: use at most that.",
            set(),
        ),
        (
            QWEN3_MOE,
            {"--num-query-groups": 3},
            "--num-query-groups 3 does not divide --num-attention-heads 32: use one of "
            "[1, 2, 4, 8, 16, 32].",
            set(),
        ),
        (
            OLMOE,
            {"--moe-layer-freq": "[0,1]"},
            "--moe-layer-freq has 2 layers, --num-layers is 16: give it one item for each layer.",
            {"GPTModel"},
        ),
        (
            OLMOE,
            {"--expert-tensor-parallel-size": 2},
            "--expert-model-parallel-size 64 * --expert-tensor-parallel-size 2 * "
            "--pipeline-model-parallel-size 1 = 128 does not divide 64 ranks. With the other sizes "
            "as they are, use --expert-model-parallel-size in [1, 2, 4, 8, 16, 32].",
            {"initialize_model_parallel"},
        ),
        (
            OLMOE,
            {"--expert-model-parallel-size": 48},
            "48 does not divide --num-experts 64: use one of [1, 2, 4, 8, 16, 32, 64].",
            {"validate_args"},
        ),
        (
            OLMOE,
            {"--expert-model-parallel-size": 0},
            "Every parallel size is at least 1.",
            {"initialize_model_parallel"},
        ),
    ],
)
def test_what_megatron_overlooks_or_sees_late(config, changes, own, megatrons, write):
    report = check_arguments(write(config, changes=changes), 64, ranks=[0])
    assert report.problems.pop(OWN_CHECKS).endswith(own)
    assert report.problems.keys() == megatrons


def test_the_report_as_json(write, capsys):
    file = write(MIXTRAL, ParallelPlan(ep_size=2))
    assert main(["megatron", "check", "--args", str(file), "--world", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["group_sizes"]["expert_parallel"] == report["world_size"] == 2
    assert report["problems"] == {} and report["ranks"][1]["experts"]["3"] == [*range(32, 64)]


def test_a_refusal_ends_with_2_and_says_which_stage(write, capsys):
    file = write(MIXTRAL, changes={"--hidden-sizes": 4})
    assert main(["megatron", "check", "--args", str(file), "--world", "64"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=2)[:2] == ["parse_args", "FAIL"]
    assert lines[2:] == [f"{name:<34} not reached" for name in STAGES[1:]]


@pytest.mark.parametrize(
    ("text", "world_size", "message"),
    [
        (None, 64, "megatron.args: cannot be read"),
        ("# nothing\n", 64, "there is no argument in it"),
        ("--num-layers 2\n", 0, "--world 0: at least 1 is needed."),
        ("--yaml-cfg model.yaml\n", 64, "--yaml-cfg is not followed. Give the arguments here."),
        ("--yaml-cfg=model.yaml\n", 64, "--yaml-cfg is not followed. Give the arguments here."),
    ],
)
def test_a_file_or_number_that_makes_no_sense(tmp_path, text, world_size, message):
    if text is not None:
        (tmp_path / "megatron.args").write_text(text)
    with pytest.raises(MegatronError, match=message):
        check_arguments(tmp_path / "megatron.args", world_size)
