"""Seeded draws: the right distribution, from streams that know only the seed and a prompt's id."""

import pytest
import torch
from transformers import LogitsProcessorList

from ds_moe_ep.engine.sampling import SeededDraw, sampling_processors

_SCORES_V = torch.tensor([0.0, 2.0, -1.0, 0.5, float("-inf"), 1.0])
_NO_INPUT = torch.zeros((1, 0), dtype=torch.int64)


def _tokens(processors, scores_BV):
    """The tokens that greedy decoding picks after the processors."""
    return processors(_NO_INPUT, scores_BV).argmax(dim=-1).tolist()


def _draw(ids, seed, *, steps=1, **settings):
    """Draws for every id, `steps` times in a row from the same distribution; a list an id."""
    settings = {"temperature": 1.0, "top_p": 1.0, **settings}
    processors = sampling_processors(ids, seed=seed, **settings)
    rows = [_tokens(processors, _SCORES_V.repeat(len(ids), 1)) for _ in range(steps)]
    return [list(tokens) for tokens in zip(*rows, strict=True)]


def _chi_square(tokens, probabilities_V):
    counts_V = torch.bincount(torch.tensor(tokens), minlength=len(probabilities_V)).double()
    expected_V = probabilities_V.double() * len(tokens)
    possible_V = expected_V > 0
    assert counts_V[~possible_V].sum() == 0
    return float((((counts_V - expected_V) ** 2)[possible_V] / expected_V[possible_V]).sum())


# Chi-square with 4 degrees of freedom (5 tokens are possible) is below 18.5 in 999 of 1000 cases;
# the seeds are fixed.
_CHI_SQUARE_4 = 18.5


def test_draws_over_many_ids_follow_softmax():
    tokens = [token for (token,) in _draw([f"id-{i}" for i in range(8000)], seed=3)]
    assert _chi_square(tokens, _SCORES_V.softmax(dim=-1)) < _CHI_SQUARE_4


def test_draws_of_one_id_over_many_steps_follow_softmax():
    (tokens,) = _draw(["a"], seed=3, steps=4000)
    assert _chi_square(tokens, _SCORES_V.softmax(dim=-1)) < _CHI_SQUARE_4


def test_temperature_sharpens_the_distribution():
    ids = [f"id-{i}" for i in range(8000)]
    tokens = [token for (token,) in _draw(ids, seed=3, temperature=0.5)]
    assert _chi_square(tokens, (_SCORES_V / 0.5).softmax(dim=-1)) < _CHI_SQUARE_4


def test_top_p_keeps_the_smallest_set_with_that_share():
    kept = _SCORES_V.softmax(dim=-1).sort(descending=True)
    # Tokens 1 and 5 have 0.77 of the probability, with token 3 it is 0.90.
    assert kept.values[:2].sum() < 0.8 < kept.values[:3].sum()
    tokens = [token for (token,) in _draw([str(i) for i in range(500)], seed=1, top_p=0.8)]
    assert set(tokens) == set(kept.indices[:3].tolist())


def test_a_masked_token_is_never_drawn():
    scores_V = torch.full((1000,), float("-inf"))
    scores_V[[0, 500]] = torch.tensor([-80.0, 5.0])  # token 0 is all but impossible
    draw = SeededDraw([str(i) for i in range(2000)], seed=0)
    tokens = _tokens(draw, scores_V.repeat(2000, 1))
    assert set(tokens) == {500}


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (1.0 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_hit_possible_tokens(monkeypatch, drawn, token):
    # Masked tokens lie at both ends; these are the least and the greatest number of torch.rand.
    scores_V = torch.tensor([float("-inf"), 1.0, 0.1, 0.1, float("-inf")])
    drawn = torch.tensor(drawn, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: drawn)
    assert _tokens(SeededDraw(["a"], seed=0), scores_V[None]) == [token]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    alone = _draw(["b"], seed=7, steps=20)[0]
    assert _draw(["a", "b", "c"], seed=7, steps=20)[1] == alone
    assert _draw(["c", "b"], seed=7, steps=20)[1] == alone


def test_ids_seeds_and_steps_have_streams_of_their_own():
    tokens_a, tokens_b = _draw(["a", "b"], seed=7, steps=30)
    assert tokens_a != tokens_b
    assert tokens_a != _draw(["a"], seed=8, steps=30)[0]
    assert len(set(tokens_a)) > 1
    # The seed and the id do not run into each other.
    assert _draw(["1:a"], seed=1, steps=30) != _draw(["a"], seed=11, steps=30)


def test_the_dtype_of_the_scores_stays():
    scores_BV = _SCORES_V[None].to(torch.bfloat16)
    assert SeededDraw(["a"], seed=0)(_NO_INPUT, scores_BV).dtype == torch.bfloat16


def test_temperature_0_is_greedy():
    assert sampling_processors(["a"], temperature=0.0, top_p=0.5, seed=1) == LogitsProcessorList()
