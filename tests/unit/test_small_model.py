"""The small model of a rehearsal: what is kept of the large one, and what is not."""

import json

import pytest

from ds_moe_ep.errors import ModelSpecError
from ds_moe_ep.model_spec import model_spec_from_config, read_model_spec
from ds_moe_ep.rehearsal.small_model import shrink_config, write_small_model
from tests.helpers.launch import REPO

CONFIGS = sorted((REPO / "configs").glob("*/config.json"))
# Decides where experts are and who computes what.
STRUCTURE = ("num_layers", "moe_layers", "num_experts", "top_k", "num_shared_experts")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_structure_and_routing_are_kept_and_widths_shrink(path):
    config = json.loads(path.read_text())
    small = shrink_config(config)
    routing = ("n_group", "topk_group", "norm_topk_prob", "scoring_func", "routed_scaling_factor")
    assert [small.get(name) for name in routing] == [config.get(name) for name in routing]
    specs = [model_spec_from_config(each, source=str(path), name="m") for each in (config, small)]
    large_spec, small_spec = specs
    for name in STRUCTURE:
        assert getattr(small_spec, name) == getattr(large_spec, name)
    assert (small_spec.mla is None) == (large_spec.mla is None)
    assert small_spec.hidden_size == 64
    assert small_spec.num_params < large_spec.num_params / 50


def test_a_model_of_a_bare_config_json_is_written(tmp_path):
    config = json.loads((REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    num_params = write_small_model(tmp_path / "config.json", tmp_path / "small")
    spec = read_model_spec(tmp_path / "small")
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.dtype) == (2, 4, 2, "float32")
    assert spec.num_params == num_params
    assert list((tmp_path / "small").glob("*.safetensors"))


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ModelSpecError, match="model_type='mine' is no causal language model"):
        write_small_model(tmp_path / "config.json", tmp_path / "small")
