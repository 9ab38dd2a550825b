"""What is settled before a weight is read: plan, configuration, dtype, context, prompts.

That a refusal reaches the user is shown by tests/e2e/test_refusals.py, in real jobs.
"""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ds_moe_ep import infer_job
from ds_moe_ep.dist.groups import Job, RankInfo
from ds_moe_ep.engine.options import DISPATCHER_NAMES, JobOptions
from ds_moe_ep.errors import ConfigError, DsMoeEpError, InputError, PlanError
from ds_moe_ep.moe.dispatch import DISPATCHERS
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import save_tiny

_CONTEXT = 64  # of the tiny models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer that knows three words."""
    folder = tmp_path_factory.mktemp("olmoe")
    save_tiny("olmoe", folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, "once": 5, "upon": 6, "a": 7}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt_token_ids": [5, 6]}\n')
    return JobOptions(model=model, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")


def _prepare(options, *, num_ranks=2, rank=0, device="cpu", nodes=(0, 0)):
    info = RankInfo(rank, rank, num_ranks, "here")
    job = Job(info, torch.device(device), control=None, nodes=nodes)
    return infer_job._prepare(options, job)


def _with_config(options, tmp_path, **settings):
    path = tmp_path / "ds_inference.json"
    path.write_text(json.dumps(settings))
    return replace(options, config=path)


def _with_prompts(options, *records):
    options.input.write_text("".join(json.dumps(record) + "\n" for record in records))
    return options


def _refused(options, error=DsMoeEpError, **kwargs):
    with pytest.raises(error) as refused:
        _prepare(options, **kwargs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "plan"),
    [
        (1, None, ParallelPlan(1)),
        (8, None, ParallelPlan(8)),
        (4, 2, ParallelPlan(2, dp_size=2)),
        (8, 1, ParallelPlan(1, dp_size=8)),
    ],
)
def test_the_plan_fills_the_ranks(options, num_ranks, ep_size, plan):
    work = _prepare(replace(options, ep_size=ep_size), num_ranks=num_ranks)
    assert work.plan == plan
    assert work.deepspeed_config["moe"]["ep_size"] == plan.ep_size


def test_the_plan_comes_from_the_config_if_the_user_gives_none(options, tmp_path):
    options = _with_config(options, tmp_path, moe={"ep_size": 2})
    assert _prepare(options, num_ranks=4).plan == ParallelPlan(2, dp_size=2)


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "says"),
    [
        (3, None, "ep_size=3 does not divide num_experts=8"),
        (16, None, "ep_size=16"),
        (3, 2, "3 GPUs"),
        (2, 4, "4 GPUs, but 2 are there"),
    ],
)
def test_a_plan_that_does_not_fit(options, num_ranks, ep_size, says):
    message = _refused(replace(options, ep_size=ep_size), PlanError, num_ranks=num_ranks)
    assert says in message


def test_a_config_of_another_plan_or_model(options, tmp_path):
    configured = _with_config(options, tmp_path, moe={"ep_size": 1})
    assert "--ep-size 2 contradicts ep_size=1" in _refused(
        replace(configured, ep_size=2), PlanError
    )
    configured = _with_config(options, tmp_path, moe={"num_experts": [64]})
    message = _refused(configured, ConfigError)
    assert "was made for 64 experts a layer" in message
    assert f"{options.model} has 8" in message


@pytest.mark.parametrize(
    ("user", "config", "device", "dtype"),
    [
        (None, None, "cpu", torch.float32),
        (None, None, "cuda", torch.bfloat16),  # the model's own
        (None, "fp16", "cpu", torch.float16),
        ("bfloat16", "fp16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype(options, tmp_path, model, user, config, device, dtype):
    own = json.loads((model / "config.json").read_text())
    folder = tmp_path / "bf16"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(own | {"dtype": "bfloat16"}))
    options = replace(options, model=folder, dtype=user)
    if config is not None:
        options = _with_config(options, tmp_path, dtype=config)
    work = _prepare(options, device=device)
    assert work.dtype == dtype
    assert work.deepspeed_config["dtype"] == str(dtype).removeprefix("torch.")


def test_the_context_is_the_models_or_less(options, tmp_path):
    assert _prepare(options).context_length == _CONTEXT
    for limit, expected in ((7, 7), (1000, _CONTEXT)):
        configured = _with_config(options, tmp_path, max_out_tokens=limit)
        assert _prepare(configured).context_length == expected


@pytest.mark.parametrize("task", ["generate", "score"])
def test_the_longest_prompt_that_fits(options, task):
    room = _CONTEXT - (task == "generate")  # one token is to be generated
    options = replace(options, task=task)
    _with_prompts(options, {"id": "long", "prompt_token_ids": [5] * room})
    assert len(_prepare(options).prompts[0].token_ids) == room
    _with_prompts(options, {"id": "long", "prompt_token_ids": [5] * (room + 1)})
    message = _refused(options, InputError)
    assert f"prompt 'long' has {room + 1} tokens, but the context of" in message
    assert message.endswith(f"Shorten it to {room}.")


def test_the_vocabulary_ends_somewhere(options):
    _with_prompts(options, {"id": "b", "prompt_token_ids": [5, 95]})
    _prepare(options)
    _with_prompts(options, {"id": "b", "prompt_token_ids": [5, 96]})
    assert "prompt 'b' has token id 96, but the vocabulary of" in _refused(options, InputError)


def test_text_and_token_ids_may_be_mixed(options):
    _with_prompts(
        options,
        {"id": "text", "prompt": "once upon"},
        {"id": "ids", "prompt_token_ids": [9]},
        {"id": "more", "prompt": "a"},
    )
    work = _prepare(options)
    assert [encoded.token_ids for encoded in work.prompts] == [(5, 6), (9,), (7,)]
    assert [encoded.prompt.id for encoded in work.prompts] == ["text", "ids", "more"]
    assert work.tokenizer.decode([5, 7]) == "once a"


def test_text_that_has_no_tokens(options):
    _with_prompts(options, {"id": "blank", "prompt": " "})
    assert "prompt 'blank' has no tokens. Remove it." in _refused(options, InputError)


def test_a_tokenizer_that_cannot_be_read(options, model, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    message = _refused(replace(options, model=folder), InputError)
    assert f"{folder}: the tokenizer cannot be read" in message


def test_only_rank_0_looks_at_the_output(options, tmp_path):
    options = replace(options, output=tmp_path / "nowhere" / "out.jsonl")
    assert "does not exist" in _refused(options, InputError)
    _prepare(options, rank=1)  # on a host of its own the folder may be another


def test_only_rank_0_looks_at_the_folder_of_the_metrics(options, tmp_path):
    options = replace(options, metrics=options.input / "metrics")
    for is_preflight in (False, True):
        message = _refused(replace(options, preflight=is_preflight), InputError)
        assert message == (
            f"{options.input}/metrics: cannot be written (Not a directory). "
            "Name another folder with --metrics."
        )
    _prepare(options, rank=1)
    _prepare(replace(options, metrics=tmp_path / "new" / "metrics"))
    assert not (tmp_path / "new").exists()


def test_a_model_whose_passes_differ_is_refused_before_its_weights_are_read(options, tmp_path):
    save_tiny("mixtral", tmp_path / "windows")
    windows = replace(options, model=tmp_path / "windows")
    message = _refused(replace(windows, cuda_graphs=True), ConfigError)
    assert "MixtralForCausalLM has layers whose cache changes its shape" in message
    for unused in ({"max_new_tokens": 1}, {"task": "score"}):  # no pass of those is replayed
        _prepare(replace(windows, cuda_graphs=True, **unused), rank=1)
    _prepare(replace(options, cuda_graphs=True))


@pytest.mark.parametrize(
    ("unused", "why"),
    [({"task": "score"}, "--task score"), ({"max_new_tokens": 1}, "--max-new-tokens 1")],
)
def test_graphs_of_no_decode_passes_are_warned_about(options, unused, why):
    said = f"--cuda-graphs is ignored: {why} has no decode passes"
    with pytest.warns(UserWarning, match=said):
        _prepare(replace(options, cuda_graphs=True, **unused))


def test_top_p_without_a_temperature_is_warned_about(options):
    with pytest.warns(UserWarning, match="--top-p is ignored: --temperature 0 is greedy"):
        _prepare(replace(options, top_p=0.9))


def test_allreduce_is_for_replicated_batches(options):
    options = replace(options, dispatcher="allreduce")
    message = _refused(options, ConfigError)
    assert "--dispatcher allreduce" in message
    assert "Add --batch-mode replicated" in message
    _prepare(replace(options, batch_mode="replicated"))


def test_two_levels_are_for_several_hosts(options):
    options = replace(options, dispatcher="allgather-2level")
    message = _refused(options, ConfigError, num_ranks=4, nodes=(0, 0, 0, 0))
    assert (
        "the 4 ranks of this job, with ep_size=4, are on 1. Use --dispatcher allgather" in message
    )
    assert "are on 2." in _refused(options, ConfigError, num_ranks=4, nodes=(0, 0, 0, 1))
    _prepare(options, num_ranks=4, nodes=(0, 0, 1, 1))


def test_every_dispatcher_can_be_asked_for():
    assert DISPATCHER_NAMES == ("auto", *DISPATCHERS)
