"""What cannot be upcycled, or not as asked: refused before anything is written, and the way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_moe_ep.adapter.ffn import find_ffns
from ds_moe_ep.checkpoint import upcycle
from ds_moe_ep.checkpoint.upcycle import upcycle_to_expert_sharded, upcycle_to_hugging_face
from ds_moe_ep.checkpoint.upcycled_tensors import UpcycleRequest
from ds_moe_ep.cli import main
from ds_moe_ep.errors import AdapterError, CheckpointError, ModelSpecError, PlanError
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import HOW_TO_UPCYCLE
from ds_moe_ep.upcycle_settings import UPCYCLE_FIELD, UpcycleSettings
from tests.helpers.dense import NUM_LAYERS, build_dense, save_dense
from tests.helpers.families import save_tiny

_LAST = NUM_LAYERS - 1
_SETTINGS = UpcycleSettings(8, 2, (0, 2), "copy", "LlamaMLP").to_dict()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A dense model that no test may change."""
    folder = tmp_path_factory.mktemp("dense")
    save_dense("llama", folder)
    return folder


def _refused(write, source, request, tmp_path, error=AdapterError, **settings):
    with pytest.raises(error) as refused:
        write(source, tmp_path / "made", request, **settings)
    assert not list(tmp_path.glob("made*"))
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 9}, "--top-k 9 with --upcycle-experts 8: a token can be sent to 1 to 8 of them"),
        ({"top_k": 0}, "--top-k 0 with --upcycle-experts 8: a token can be sent to 1 to 8 of them"),
        ({"num_experts": 0}, "--top-k 2 with --upcycle-experts 0"),
        (
            {"layers": (0, 3)},
            f"layer 3 has no FFN to upcycle: 3 layers have one, from 0 to {_LAST}",
        ),
        ({"layers": (-1,)}, "layer -1 has no FFN to upcycle"),
        ({"every": 4}, "--every 4: no layer would get experts. Use 1 to 3, or name them: --layers"),
        ({"every": 0}, "--every 0: no layer would get experts"),
        (
            {"method": "split", "num_experts": 5},
            "--method split: --upcycle-experts 5 does not divide the FFN's width 32 "
            "(model.layers.0.mlp). Use one of [1, 2, 4, 8, 16], or --method copy.",
        ),
        ({"method": "melt"}, "--method melt: use one of copy, split"),
        (
            {"ffn_class": "MLP"},
            "LlamaForCausalLM has no layer of class MLP. Its layers hold these classes with linear "
            "layers: LlamaAttention, LlamaMLP. Name the one that is the FFN: --ffn-class NAME.",
        ),
        (
            {"ffn_class": "LlamaAttention"},
            "--ffn-class LlamaAttention: it cannot be upcycled: it has 4 linear layers of its own.",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_model(llama, settings, expected, tmp_path):
    request = UpcycleRequest(**{"num_experts": 8, "top_k": 2, **settings})
    for write in (upcycle_to_expert_sharded, upcycle_to_hugging_face):
        assert expected in _refused(write, llama, request, tmp_path)


@pytest.mark.parametrize(
    ("ep_size", "error", "expected"),
    [(3, AdapterError, "ep_size=3 does not divide num_experts=8"), (0, PlanError, "at least 1")],
)
def test_an_ep_size_that_does_not_fit(llama, ep_size, error, expected, tmp_path):
    request = UpcycleRequest(8, 2)
    message = _refused(upcycle_to_expert_sharded, llama, request, tmp_path, error, ep_size=ep_size)
    assert expected in message


@pytest.mark.parametrize("write", [upcycle_to_expert_sharded, upcycle_to_hugging_face])
def test_a_model_that_has_experts(write, tmp_path):
    save_tiny("mixtral", tmp_path / "moe")
    message = _refused(write, tmp_path / "moe", UpcycleRequest(8, 2), tmp_path)
    assert "(mixtral) has experts already: only dense models are upcycled" in message


def test_an_upcycled_model(llama, tmp_path):
    upcycle_to_expert_sharded(llama, tmp_path / "once", UpcycleRequest(8, 2))
    request = UpcycleRequest(8, 2)
    message = _refused(upcycle_to_expert_sharded, tmp_path / "once", request, tmp_path)
    assert "once (llama) has experts already" in message


@pytest.mark.parametrize(
    ("family", "settings", "request_settings", "expected"),
    [
        (
            "gpt2",
            {},
            {},
            "no MoE family that is known to compute what gpt2 does; there is one for ",
        ),
        (
            "llama",
            {"attention_bias": True},
            {},
            "attention_bias=True of this llama model cannot be ",
        ),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias=True of this llama model cannot be expressed"),
        (
            "mistral",
            {},
            {"every": 2},
            "2 of 3 layers are to stay dense, but every layer of mixtral",
        ),
        ("olmo2", {}, {"layers": (0,)}, "2 of 3 layers are to stay dense, but every layer of flex"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            {},
            "layer_types of this qwen3 model are full_attention, sliding_attention, but in "
            "qwen3_moe all layers attend alike",
        ),
    ],
)
def test_what_no_moe_family_computes(family, settings, request_settings, expected, tmp_path):
    save_dense(family, tmp_path / "dense", **settings)
    request = UpcycleRequest(8, 2, **request_settings)
    message = _refused(upcycle_to_hugging_face, tmp_path / "dense", request, tmp_path)
    assert message.startswith("--to hf: ") and expected in message
    assert message.endswith("checkpoint instead, which launch/infer.py runs: --to ep.")
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)


@pytest.mark.parametrize("change", ["lost", "of another shape", "of a type without fractions"])
def test_weights_that_are_not_the_models(change, tmp_path):
    save_dense("llama", tmp_path / "dense")
    path, key = tmp_path / "dense" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    if change == "lost":
        del tensors[key]
    elif change == "of another shape":
        tensors[key] = tensors[key][:-1].contiguous()
    else:
        tensors = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    message = _refused(
        upcycle_to_expert_sharded,
        tmp_path / "dense",
        UpcycleRequest(8, 2),
        tmp_path,
        CheckpointError,
    )
    if change == "of a type without fractions":
        assert "a weight of type I8 cannot be upcycled" in message
    else:
        assert key in message


class _Odd(nn.Module):
    """Looks like an FFN and computes something else."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 32), nn.Linear(32, 16), nn.ReLU()

    def forward(self, x):
        return self.down(self.act(self.up(x))) + x


class _Swapped(_Odd):
    """An FFN with its parts in another order, and a gate behind."""

    def __init__(self):
        super().__init__()
        self.a_gate = nn.Linear(16, 32)

    def forward(self, x):
        return self.down(self.up(x) * self.act(self.a_gate(x)))


def _with_ffns(kind):
    model = build_dense("llama")
    for layer in model.model.layers:
        layer.mlp = kind()
    return model


def test_a_module_that_computes_something_else_is_no_ffn():
    with pytest.raises(AdapterError, match="no FFN of a kind that is known.*_Odd.*--ffn-class"):
        find_ffns(_with_ffns(_Odd))
    with pytest.raises(AdapterError, match="_Odd: it cannot be upcycled: it computes something"):
        find_ffns(_with_ffns(_Odd), "_Odd")


def test_an_ffn_of_a_class_nobody_knows_is_understood():
    ffns = find_ffns(_with_ffns(_Swapped), "_Swapped")
    assert [(ffn.layer, ffn.name) for ffn in ffns] == [
        (layer, f"model.layers.{layer}.mlp") for layer in range(NUM_LAYERS)
    ]
    layout = ffns[0].layout
    assert (layout.up, layout.down, layout.activation) == (("a_gate", "up"), "down", "act")
    assert layout.has_gate and layout.has_bias and not layout.is_transposed


def test_ffns_of_two_classes_must_be_told_apart():
    model = _with_ffns(_Swapped)
    model.model.layers[1] = build_dense("llama").model.layers[1]
    with pytest.raises(AdapterError, match="2 classes: LlamaMLP, _Swapped.*--ffn-class LlamaMLP"):
        find_ffns(model)
    assert [ffn.layer for ffn in find_ffns(model, "LlamaMLP")] == [1]


def test_two_ffns_in_a_layer_cannot_be_told_by_layer():
    model = build_dense("llama")
    for layer in model.model.layers:
        layer.second = layer.mlp.__class__(model.config)
    with pytest.raises(AdapterError, match="6 FFNs of class LlamaMLP in model.layers, some layers"):
        find_ffns(model)


def test_ffns_of_two_widths_do_not_become_experts_of_one():
    narrow = build_dense("llama", intermediate_size=24)
    model = build_dense("llama")
    model.model.layers[2] = narrow.model.layers[2]
    ffns, request = find_ffns(model), UpcycleRequest(8, 2)
    with pytest.raises(AdapterError, match=r"layers.0.mlp has width 32, .*2.mlp has width 24: all"):
        upcycle._settings(request, ffns)
    assert upcycle._settings(request, ffns[:2]).layers == (0, 1)


class _TransposedGate(nn.Module):
    """A gated FFN with GPT-2's kind of matrices."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = Conv1D(32, 16), Conv1D(32, 16), Conv1D(16, 32)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_a_gate_and_transposed_matrices():
    with pytest.raises(AdapterError, match="it has a gate, and its matrices are transposed"):
        find_ffns(_with_ffns(_TransposedGate), "_TransposedGate")


def test_looking_for_ffns_draws_no_random_number():
    model, state = build_dense("llama"), torch.get_rng_state()
    find_ffns(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"top_k": 9}, "ds_moe_ep_upcycle.top_k=9: more than num_experts=8"),
        ({"num_experts": 0}, "ds_moe_ep_upcycle.num_experts=0: a whole number of at least 1"),
        ({"num_experts": True}, "ds_moe_ep_upcycle.num_experts=True: a whole number"),
        ({"layers": []}, "ds_moe_ep_upcycle.layers=[]: layer numbers are needed, ascending"),
        ({"layers": [2, 0]}, "ds_moe_ep_upcycle.layers=[2, 0]: layer numbers"),
        ({"layers": [0, 3]}, "num_layers=3, so the last one is layer 2"),
        ({"method": "melt"}, "ds_moe_ep_upcycle.method='melt': use one of copy, split"),
        ({"method": "split", "num_experts": 5}, "num_experts=5 does not divide intermediate_size"),
        ({"ffn_class": 1}, "ds_moe_ep_upcycle.ffn_class=1: a class name is needed"),
        ({"topk": 2}, "ds_moe_ep_upcycle.topk=2: there is no such setting; did you mean top_k?"),
        ({"colour": 2}, "there is no such setting; known are num_experts, top_k, layers, method"),
    ],
)
def test_a_config_that_was_edited(llama, change, expected, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config[UPCYCLE_FIELD] = _SETTINGS | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSpecError) as refused:
        read_model_spec(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ds_moe_ep_upcycle")
    assert expected in str(refused.value)


@pytest.mark.parametrize("value", [[], "yes", 3])
def test_a_config_whose_field_is_no_object(llama, value, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {UPCYCLE_FIELD: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSpecError, match=r"ds_moe_ep_upcycle=.*: an object is needed"):
        read_model_spec(tmp_path)


def test_a_config_that_lacks_a_setting():
    del (settings := dict(_SETTINGS))["top_k"]
    with pytest.raises(ModelSpecError, match=r"c: ds_moe_ep_upcycle.top_k=None: it is missing"):
        UpcycleSettings.from_dict(settings, source="c")


def test_a_model_with_experts_is_not_also_upcycled(tmp_path):
    save_tiny("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {UPCYCLE_FIELD: _SETTINGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSpecError, match="is for dense models, but mixtral has experts of its"):
        read_model_spec(tmp_path)


_UPCYCLE = ["convert", "SRC", "DST", "--to", "ep", "--upcycle-experts", "8"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (_UPCYCLE, "--upcycle-experts needs --top-k: how many experts a token is sent to"),
        (
            [*_UPCYCLE, "--top-k", "2", "--every", "2", "--layers", "1"],
            "argument --layers: not allowed with argument --every",
        ),
        ([*_UPCYCLE, "--layers", "1;2"], "'1;2': layer numbers are needed, like 3,5,7"),
        ([*_UPCYCLE, "--method", "melt"], "argument --method: invalid choice: 'melt'"),
        ([*_UPCYCLE, "--router-init", "ones"], "'ones': use zero, or normal:STD, like normal:0.02"),
        ([*_UPCYCLE, "--router-init", "normal:-1"], "'-1': a standard deviation of at least 0"),
        ([*_UPCYCLE, "--noise", "loud"], "'loud': a standard deviation of at least 0 is needed"),
        ([*_UPCYCLE, "--top-k", "2", "--trust-remote-code"], "--trust-remote-code is not for"),
        (
            ["convert", "SRC", "DST", "--to", "deepspeed", "--upcycle-experts", "8"],
            "--upcycle-experts takes --to ep or --to hf",
        ),
        (
            ["convert", "SRC", "DST", "--to", "ep", "--top-k", "2"],
            "--top-k is for --upcycle-experts only",
        ),
        (
            ["convert", "SRC", "DST", "--to", "hf", "--router-init", "zero"],
            "--router-init is for --upcycle-experts only",
        ),
        (
            ["convert", "SRC", "DST", "--to", "hf", "--upcycle-experts", "8", "--ep-size", "2"],
            "--ep-size is for --to ep only",
        ),
    ],
)
def test_arguments_that_make_no_sense(args, expected, capsys):
    with pytest.raises(SystemExit) as refused:
        main(args)
    assert refused.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_command_says_what_is_wrong_with_the_model(llama, tmp_path, capsys):
    args = [str(llama), str(tmp_path / "made"), "--to", "hf", "--upcycle-experts", "8"]
    assert main(["convert", *args, "--top-k", "2", "--every", "2"]) == 2
    assert capsys.readouterr().err.startswith("AdapterError: --to hf: 2 of 3 layers are to stay")


def test_what_a_dense_model_is_refused_with_is_a_command_that_works(llama, tmp_path, capsys):
    _, _, command = HOW_TO_UPCYCLE.partition("ds-moe-ep ")
    words = {"MODEL": str(llama), "DST": str(tmp_path / "made")}
    assert main([words.get(word, word) for word in command.split()]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'made'}: ")
    assert read_model_spec(tmp_path / "made").num_experts == 64
