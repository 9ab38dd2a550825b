"""One batch of prompts on a plain model: padding, cutting, limits, and scores."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.engine.decoding import warn_of_ignored
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.tasks import (
    EncodedPrompt,
    GenerateSettings,
    generate_batch,
    pad_left,
    score_batch,
)
from tests.helpers.dense import build_dense
from tests.helpers.families import build_tiny

_CPU = torch.device("cpu")
_CONTEXT = 64  # of the tiny models
_SETTINGS = GenerateSettings(max_new_tokens=6, context_length=_CONTEXT)
_LONG = tuple(range(3, 3 + _CONTEXT - 2)), 2  # and its room
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
_TOKEN_IDS = {"a": (5, 9, 33, 4, 71), "b": (17,), "c": (3, 88, 12)}
_BATCH = [
    EncodedPrompt(Prompt(id=name, text=None, token_ids=ids), ids)
    for name, ids in _TOKEN_IDS.items()
]


class _Engine:
    """What `deepspeed.init_inference` returns, as far as tasks see it."""

    def __init__(self, model):
        self.module, self.generate = model, model.generate

    def __call__(self, **kwargs):
        return self.module(**kwargs)


@pytest.fixture
def engine():
    model = build_tiny("olmoe")
    model.generation_config.eos_token_id = None
    return _Engine(model)


def _greedy(engine, ids, count=6):
    """What transformers generates for one prompt alone, without an end token."""
    output = engine.module.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tuple(output[0, len(ids) :].tolist())


def _generate(engine, settings=_SETTINGS, *, batch=_BATCH, tokenizer=None):
    return generate_batch(engine, batch, settings, tokenizer)


def test_pad_left():
    ids_BL, mask_BL = pad_left([(5, 6, 7), (8,)], 99, _CPU)
    assert ids_BL.tolist() == [[5, 6, 7], [99, 99, 8]]
    assert mask_BL.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids_BL.dtype == mask_BL.dtype == torch.int64


def test_a_padded_batch_gives_what_each_prompt_gives_alone(engine):
    results = _generate(engine)
    assert [result.id for result in results] == ["a", "b", "c"]
    for result in results:
        assert result.token_ids == _greedy(engine, _TOKEN_IDS[result.id])
        assert result.finish_reason == "length"
        assert result.prompt is None
        assert result.completion is None


def test_a_row_ends_with_its_end_token_and_the_others_go_on(engine):
    alone = {name: _greedy(engine, ids) for name, ids in _TOKEN_IDS.items()}
    end = alone["a"][2]
    engine.module.generation_config.eos_token_id = [end, 95]
    expected = {
        name: (ids[: ids.index(end) + 1], "stop") if end in ids else (ids, "length")
        for name, ids in alone.items()
    }
    assert len(expected["a"][0]) <= 3
    assert "length" in {reason for _, reason in expected.values()}
    results = _generate(engine)
    assert {r.id: (r.token_ids, r.finish_reason) for r in results} == expected


def test_an_end_token_in_the_last_place_is_a_stop(engine):
    alone = _greedy(engine, _TOKEN_IDS["b"])
    count = alone.index(alone[-1]) + 1
    engine.module.generation_config.eos_token_id = alone[-1]
    (result,) = _generate(engine, replace(_SETTINGS, max_new_tokens=count), batch=_BATCH[1:2])
    assert (result.token_ids, result.finish_reason) == (alone[:count], "stop")


def _beside_long(ids):
    """A prompt that all but fills the context, and one of a few tokens."""
    prompts = {"long": tuple(ids), "short": _TOKEN_IDS["b"]}
    return [
        EncodedPrompt(Prompt(id=name, text=None, token_ids=each), each)
        for name, each in prompts.items()
    ]


def test_prompt_and_completion_fit_the_context_together(engine):
    ids, room = _LONG
    of_long, of_short = _generate(engine, batch=_beside_long(ids))
    assert (of_long.token_ids, of_long.finish_reason) == (_greedy(engine, ids, room), "length")
    assert of_short.token_ids == _greedy(engine, _TOKEN_IDS["b"])


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("opt", {}), ("llama", {"rope_parameters": _DYNAMIC})],
    ids=["learned", "learned, shifted", "dynamic"],
)
def test_a_row_without_room_gets_no_position_beyond_the_context(family, settings):
    engine = _Engine(build_dense(family, **settings))
    engine.module.generation_config.eos_token_id = None
    ids = [3 + place % 37 for place in range(_CONTEXT - 2)]
    how = replace(_SETTINGS, max_new_tokens=30)
    of_long, of_short = _generate(engine, how, batch=_beside_long(ids))
    assert (of_long.token_ids, of_long.finish_reason) == (_greedy(engine, ids, 2), "length")
    assert of_short.token_ids == _greedy(engine, _TOKEN_IDS["b"], 30)


def test_a_batch_ends_with_its_last_room(engine):
    ids, room = _LONG
    engine.module.generation_config.eos_token_id = _greedy(engine, _TOKEN_IDS["b"])[0]
    passes = []
    engine.module.register_forward_pre_hook(lambda *args: passes.append(1))
    of_long, of_short = _generate(engine, batch=_beside_long(ids))
    assert (len(of_long.token_ids), len(of_short.token_ids)) == (room, 1)
    assert len(passes) == room


def test_a_row_without_room_needs_no_experts(engine):
    live_rows = LiveRows([], _CPU)
    live = []
    engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: live.append(live_rows.of_pass(kwargs["input_ids"])),
        with_kwargs=True,
    )
    generate_batch(engine, _beside_long(_LONG[0]), _SETTINGS, None, live_rows)
    assert live[1] is None
    assert [each.tolist() for each in live[2:]] == [[False, True]] * 4
    assert live_rows.num_completing == 2 + 6


def test_the_models_own_way_of_decoding_gives_way_to_the_users(engine):
    config = engine.module.generation_config
    config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.9, num_beams=3, max_length=8)
    (result,) = _generate(engine, batch=_BATCH[:1])
    assert config.num_beams == 3  # the model's settings are left alone
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None, num_beams=1)
    assert result.token_ids == _greedy(engine, _TOKEN_IDS["a"])


@pytest.mark.parametrize(
    "foreign",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["the"]},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 2.0},
        {"max_time": 1e-9},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prefill_chunk_size": 2},
        {"token_healing": True},
        {"pad_token_id": 10**6},
    ],
    ids=lambda foreign: next(iter(foreign)),
)
def test_foreign_settings_of_the_model_change_nothing(engine, foreign):
    expected = [_greedy(engine, ids) for ids in _TOKEN_IDS.values()]
    config = engine.module.generation_config
    for name, value in foreign.items():
        setattr(config, name, value)
    passes = []
    engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert [result.token_ids for result in _generate(engine)] == expected
    assert passes == [(3, 5), *[(3, 1)] * 5]
    assert engine.module.generation_config is config
    assert {name: getattr(config, name) for name in foreign} == foreign


def test_a_setting_that_would_change_tokens_is_ignored_by_name(engine):
    config = engine.module.generation_config
    config.num_beams, config.guidance_scale, config.stop_strings = 1, 1.5, ["the", "end"]
    with pytest.warns(UserWarning) as warned:
        warn_of_ignored(config)
    assert [str(each.message) for each in warned] == [
        "generation_config.json: guidance_scale=1.5, stop_strings=['the', 'end'] ignored: each "
        "prompt has one completion of one token after the other, which ends at an end token or "
        "--max-new-tokens."
    ]


def test_usual_settings_are_not_warned_of(engine, recwarn):
    config = engine.module.generation_config
    config.do_sample, config.temperature, config.top_p = True, 0.7, 0.9
    config.num_beams, config.guidance_scale, config.repetition_penalty = 1, 1.0, 1.05
    warn_of_ignored(config)
    assert not recwarn


def test_penalties_of_the_model_stay(engine):
    engine.module.generation_config.repetition_penalty = 1e6
    (result,) = _generate(engine, batch=_BATCH[:1])
    assert len({*_TOKEN_IDS["a"], *result.token_ids}) == 5 + 6  # nothing comes twice


# Token 0 is what prompts are padded with.
@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0, "sequence_bias": [[[0], 3.0]]},
        {"no_repeat_ngram_size": 1, "sequence_bias": [[[0], 3.0]]},
        {"min_length": 5},
        {"min_new_tokens": 3},
        {"min_length": 6, "min_new_tokens": 2},
        {"encoder_repetition_penalty": 3.0, "sequence_bias": [[[0], 3.0]]},
        {"begin_suppress_tokens": [0], "sequence_bias": [[[0], 3.0]]},
        {"forced_eos_token_id": 7},
    ],
    ids=" and ".join,
)
def test_settings_of_the_model_see_no_padding(engine, own):
    """Each prompt beside longer ones, against transformers with one at a time."""
    config = engine.module.generation_config
    config.eos_token_id = [7, _greedy(engine, _TOKEN_IDS["b"])[0]]
    for name, value in own.items():
        setattr(config, name, value)
    alone = {name: _greedy(engine, ids) for name, ids in _TOKEN_IDS.items()}
    assert {result.id: result.token_ids for result in _generate(engine)} == alone
    ids, room = _LONG
    of_long, of_short = _generate(engine, batch=_beside_long(ids))
    assert of_long.token_ids == _greedy(engine, ids, room)
    assert of_short.token_ids == alone["b"]


def test_draws_with_settings_of_the_model_do_not_depend_on_the_batch(engine):
    config = engine.module.generation_config
    config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, sequence_bias=[[[0], 3.0]])
    how = replace(_SETTINGS, temperature=0.5, seed=7)
    together = {result.id: result.token_ids for result in _generate(engine, how)}
    alone = {r.id: r.token_ids for each in _BATCH for r in _generate(engine, how, batch=[each])}
    assert together == alone
    assert 0 in together["b"]


def test_text_comes_from_the_tokenizer(engine):
    seen = []

    def decode(token_ids, *, skip_special_tokens):
        seen.append((tuple(token_ids), skip_special_tokens))
        return "text"

    (result,) = _generate(engine, batch=_BATCH[:1], tokenizer=SimpleNamespace(decode=decode))
    assert result.completion == "text"
    assert seen == [(result.token_ids, True)]


def test_sampling_does_not_depend_on_the_batch(engine):
    settings = replace(_SETTINGS, temperature=1.0, top_p=0.95, seed=7)
    together = {r.id: r.token_ids for r in _generate(engine, settings)}
    alone = {r.id: r.token_ids for e in _BATCH for r in _generate(engine, settings, batch=[e])}
    assert together == alone
    other = {r.id: r.token_ids for r in _generate(engine, replace(settings, seed=8))}
    assert other != together


def test_scores_are_log_probabilities_of_every_token_but_the_first(engine):
    for result in score_batch(engine, _BATCH):
        ids = torch.tensor(_TOKEN_IDS[result.id])
        with torch.no_grad():
            logprobs_LV = engine.module(ids[None]).logits[0].log_softmax(dim=-1)
        expected = logprobs_LV[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(result.token_logprobs), expected, rtol=1e-5, atol=1e-6
        )
        assert result.num_tokens == len(ids)
        assert result.logprob == pytest.approx(sum(result.token_logprobs), abs=1e-12)


def test_a_prompt_of_one_token_has_nothing_to_score(engine):
    (result,) = score_batch(engine, _BATCH[1:2])
    assert (result.num_tokens, result.logprob, result.token_logprobs) == (1, 0.0, ())
