"""A converted checkpoint gives Hugging Face's logits in Megatron's GPTModel, at any ep_size.

One job of four ranks runs all cases: starting ranks is what costs time. `pytest -s` tells the
largest difference of each.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_moe_ep.megatron.arguments import one_parser, parse_arguments, read_arguments
from ds_moe_ep.megatron.model import start_model_parallel
from ds_moe_ep.megatron.score import megatron_logits
from ds_moe_ep.megatron.stand_ins import megatron_stand_ins
from tests.helpers import run_ranks
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.families.megatron import MEGATRON_CASES
from tests.megatron.converted import load_converted, save_converted

WORLD_SIZE = 4
TOLERANCE = 5e-6
# Tokens of each rank. The dispatcher allgather needs the same number everywhere.
UNEVEN, EVEN = (2, 16, 30, 44), (16, 16, 16, 16)
SETTINGS = {
    (1, "alltoall"): UNEVEN,
    (1, "allgather"): EVEN,
    (2, "alltoall"): UNEVEN,
    (2, "allgather"): EVEN,
    (4, "alltoall"): UNEVEN,
}
"""ep_size and dispatcher to the number of tokens of each rank."""


def tokens(rank: int, setting: tuple[int, str]) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, VOCAB_SIZE, (1, SETTINGS[setting][rank]), generator=generator)


def run_all(rank: int, world_size: int, root: Path) -> dict[tuple[str, tuple[int, str]], Tensor]:
    """Returns this rank's logits of its own tokens for every case and setting."""
    from megatron.core import parallel_state

    found = {}
    for ep_size in (1, 2, 4):
        words = read_arguments(root / next(iter(MEGATRON_CASES)) / f"ep{ep_size}.args")
        args = parse_arguments(words, rank=rank, world_size=world_size)
        start_model_parallel(args, timeout_s=60)
        for case in MEGATRON_CASES:
            for setting in (setting for setting in SETTINGS if setting[0] == ep_size):
                model = load_converted(
                    root / case,
                    ep_size,
                    *("--moe-token-dispatcher-type", setting[1]),
                    rank=rank,
                    world_size=world_size,
                )
                found[case, setting] = megatron_logits(model, tokens(rank, setting))
        parallel_state.destroy_model_parallel()
    return found


def on_rank(rank: int, world_size: int, root: Path) -> dict[tuple[str, tuple[int, str]], Tensor]:
    with megatron_stand_ins(), one_parser():
        return run_all(rank, world_size, root)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron")
    return root, {case: save_converted(case, root / case, WORLD_SIZE) for case in MEGATRON_CASES}


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """What each rank found."""
    root, _ = models
    return run_ranks(on_rank, WORLD_SIZE, tmp_path_factory.mktemp("parity"), root, timeout_s=400)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"ep{setting[0]}-{setting[1]}")
@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_logits_are_hugging_faces(case, setting, models, found):
    _, hf = models
    differences = []
    for rank in range(WORLD_SIZE):
        with torch.no_grad():
            expected = hf[case](tokens(rank, setting)).logits
        assert expected.std() > 0.1
        differences.append(float((found[rank][case, setting] - expected).abs().max()))
    print(f"\n{case}, ep_size {setting[0]}, {setting[1]}: at most {max(differences):.1e}")
    assert max(differences) <= TOLERANCE, differences
