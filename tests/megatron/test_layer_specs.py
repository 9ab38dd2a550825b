"""Why generated arguments name layers of ours: Megatron's own do not take these models.

That ours compute what Hugging Face's do is tested in test_parity.py.
"""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.errors import DsMoeEpError
from ds_moe_ep.megatron.arguments import parse_arguments, read_arguments
from ds_moe_ep.megatron.model import start_model_parallel
from tests.megatron.converted import load_converted, save_converted


@pytest.fixture
def one_rank():
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def model(one_rank, tmp_path):
    """`model(case)` returns the folder of a converted model, and its arguments."""

    def made(case):
        save_converted(case, tmp_path)
        words = read_arguments(tmp_path / "ep1.args")
        start_model_parallel(parse_arguments(words, rank=0, world_size=1), timeout_s=60)
        return tmp_path, words

    return made


@pytest.mark.parametrize(
    ("case", "refusal"),
    [
        ("olmoe", r"shape mismatch .* key decoder.layers.self_attention.[qk]_layernorm.weight"),
        ("deepseek_v3", "unexpected keyword argument 'k_channels'"),
    ],
)
def test_megatrons_own_layers_do_not_take_the_model(case, refusal, model):
    folder, words = model(case)
    load_converted(folder)
    place = words.index("--spec")
    with pytest.raises(DsMoeEpError, match=refusal):
        load_converted(folder, words=words[:place] + words[place + 3 :])


def test_megatrons_own_latent_attention_does_not_take_queries_like_v2_lites(model, monkeypatch):
    from ds_moe_ep.megatron import layer_specs

    folder, _ = model("deepseek_v2, like V2-Lite")
    load_converted(folder)
    monkeypatch.setattr(layer_specs, "DirectQueryAttention", layer_specs.MLASelfAttention)
    with pytest.raises(DsMoeEpError, match="`q_lora_rank is None`, meaning it will not be used"):
        load_converted(folder)
