"""Megatron checkpoints without Megatron: torch's own reader, tables made by hand, and refusals.

What Megatron itself makes of them is tested in tests/megatron/test_checkpoint.py.
"""

import enum
import filecmp
import io
import json
import os
import pickle
import random
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from transformers import AutoModelForCausalLM

from ds_moe_ep.checkpoint.convert import to_expert_sharded, to_hugging_face
from ds_moe_ep.checkpoint.megatron import torch_dist
from ds_moe_ep.checkpoint.megatron.convert import from_megatron, to_megatron, verify_megatron
from ds_moe_ep.checkpoint.megatron.stored import open_torch_dist
from ds_moe_ep.cli import main
from ds_moe_ep.errors import CheckpointError, ConfigError
from tests.helpers.families import NUM_EXPERTS, build_tiny, save_tiny
from tests.helpers.families.megatron import MEGATRON_CASES

NUM_LAYERS = 3


def save_case(case, folder, dtype=torch.float32):
    family, changes = MEGATRON_CASES[case]
    model = build_tiny(family, **changes).to(dtype)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def converted(tmp_path):
    """An OLMoE model's tensors; its source and checkpoint are in the folders of these names."""
    tensors = save_case("olmoe", tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "megatron", "local")
    return tensors


def read_by_torch(folder):
    """Everything in a checkpoint, tensors and objects, as torch's own reader reads it."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        key: io.BytesIO()
        if isinstance(entry, BytesStorageMetadata)
        else torch.full(entry.size, -1, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def objects_of(state):
    return {key for key, value in state.items() if not isinstance(value, torch.Tensor)}


def same_files(one, other):
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(other))
    assert filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_there_and_back_the_files_are_the_same(case, tmp_path):
    save_case(case, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    for spec in ("local", "te"):
        done = to_megatron(tmp_path / "source", tmp_path / spec, spec)
        assert done.not_copied == ()
        assert verify_megatron(tmp_path / spec).num_files == done.num_files
        from_megatron(tmp_path / spec, tmp_path / f"{spec}-hf")
        same_files(tmp_path / "source", tmp_path / f"{spec}-hf")


def test_stacked_layers_as_torch_reads_them(tmp_path, converted):
    state = read_by_torch(tmp_path / "megatron" / "release")
    hf, layers = converted, range(NUM_LAYERS)
    # Two heads of 8 rows share a key, and there are two such groups.
    qkv = [
        torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
        for q, k, v in (
            [hf[f"model.layers.{n}.self_attn.{name}_proj.weight"] for name in "qkv"] for n in layers
        )
    ]
    experts = [f"model.layers.{n}.mlp.experts.{e}." for n in layers for e in range(NUM_EXPERTS)]
    gate_up = [
        torch.cat([hf[f"{expert}gate_proj.weight"], hf[f"{expert}up_proj.weight"]])
        for expert in experts
    ]
    down = [hf[f"{expert}down_proj.weight"] for expert in experts]
    stacked = {
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "self_attention.q_layernorm.weight": "self_attn.q_norm",
        "self_attention.k_layernorm.weight": "self_attn.k_norm",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
        "mlp.router.weight": "mlp.gate",
    }
    expected = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack(qkv),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.stack(gate_up).unflatten(
            0, (NUM_LAYERS, NUM_EXPERTS)
        ),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": torch.stack(down).unflatten(
            0, (NUM_LAYERS, NUM_EXPERTS)
        ),
        **{
            f"decoder.layers.{name}": torch.stack(
                [hf[f"model.layers.{n}.{of}.weight"] for n in layers]
            )
            for name, of in stacked.items()
        },
    }
    assert state.keys() - objects_of(state) == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    attention = [
        f"linear_{name}._extra_state/shard_{n}_3" for name in ("qkv", "proj") for n in layers
    ]
    matrices = [
        f"linear_fc{which}._extra_state/shard_{n}.{e}_3.{NUM_EXPERTS}"
        for which in (1, 2)
        for n in layers
        for e in range(NUM_EXPERTS)
    ]
    assert objects_of(state) == {
        *(f"decoder.layers.self_attention.{name}" for name in attention),
        *(f"decoder.layers.mlp.experts.experts.{name}" for name in matrices),
    }
    for key in objects_of(state):
        assert state[key] == [None]
    common = torch.load(tmp_path / "megatron" / "release" / "common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0


# From core/models/gpt/gpt_layer_specs.py of megatron-core 0.19.2: of layers 0 (dense but for OLMoE)
# and 1 the norms before and after attention and, in latent attention, of queries and keys.
NORMS = {
    ("olmoe", "te"): [
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.pre_mlp_layernorm.weight",
    ],
    ("qwen3_moe", "local"): [
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    ],
    ("qwen3_moe", "te"): [
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
    ],
    ("deepseek_v3", "local"): [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.self_attention.kv_layernorm.weight",
    ],
    ("deepseek_v3", "te"): [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
    ],
}


@pytest.mark.parametrize(("case", "spec"), NORMS)
def test_norms_are_called_what_the_layers_call_them(case, spec, tmp_path):
    hf = save_case(case, tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "megatron", spec)
    state = read_by_torch(tmp_path / "megatron" / "release")
    assert set(NORMS[case, spec]) <= state.keys()
    norms = [key for key in state if "norm" in key and key not in objects_of(state)]
    other = "local" if spec == "te" else "te"
    assert not set(norms) & set(NORMS.get((case, other), [])) - set(NORMS[case, spec])
    is_stacked = case == "olmoe"
    after = [
        key for key in norms if key.endswith(("pre_mlp_layernorm.weight", "c1.layer_norm_weight"))
    ]
    assert len(after) == (1 if is_stacked else NUM_LAYERS)
    wanted = [hf[f"model.layers.{n}.post_attention_layernorm.weight"] for n in range(NUM_LAYERS)]
    found = state[after[0]] if is_stacked else torch.stack([state[key] for key in sorted(after)])
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_an_expert_sharded_source_gives_the_same(case, tmp_path):
    save_case(case, tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "wanted", "te")
    to_expert_sharded(tmp_path / "source", tmp_path / "ep", 4)
    done = to_megatron(tmp_path / "ep", tmp_path / "found", "te")
    assert done.not_copied == ()
    same_files(tmp_path / "wanted" / "release", tmp_path / "found" / "release")
    assert from_megatron(tmp_path / "found", tmp_path / "hf").not_copied == ()
    same_files(tmp_path / "source", tmp_path / "hf")


def test_large_tensors_are_written_in_parts(tmp_path, converted):
    to_megatron(tmp_path / "source", tmp_path / "parts", "local", max_chunk_bytes=1000)
    metadata = dcp.FileSystemReader(tmp_path / "parts" / "release").read_metadata()
    assert (
        max(
            chunk.sizes.numel() * 4
            for entry in metadata.state_dict_metadata.values()
            for chunk in getattr(entry, "chunks", [])
        )
        <= 1000
    )
    whole, parts = (read_by_torch(tmp_path / name / "release") for name in ("megatron", "parts"))
    assert whole.keys() == parts.keys()
    tensors = whole.keys() - objects_of(whole)
    assert all(torch.equal(whole[key], parts[key]) for key in tensors)
    from_megatron(tmp_path / "parts", tmp_path / "hf")
    same_files(tmp_path / "source", tmp_path / "hf")


def test_every_tensor_keeps_its_type(tmp_path):
    tensors = save_case("deepseek_v3", tmp_path / "source", torch.bfloat16)
    for key in tensors:
        if key.endswith("e_score_correction_bias"):
            tensors[key] = torch.randn(NUM_EXPERTS)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    state = read_by_torch(tmp_path / "megatron" / "release")
    assert state["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert state["decoder.layers.1.mlp.router.weight"].dtype == torch.bfloat16
    from_megatron(tmp_path / "megatron", tmp_path / "hf")
    same_files(tmp_path / "source", tmp_path / "hf")


def test_what_another_writer_saved_with_a_padded_vocabulary(tmp_path, converted):
    """Whole tensors, each in one part, as torch's own writer saves them."""
    state = read_by_torch(tmp_path / "megatron" / "release")
    state = {key: state[key] for key in state.keys() - objects_of(state)}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[key] = torch.cat([state[key], torch.zeros(32, 32)])
    folder = tmp_path / "saved" / "iter_0000100"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("100")
    from_megatron(tmp_path / "saved", tmp_path / "hf", tmp_path / "source")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == converted.keys()
    assert all(torch.equal(found[key], converted[key]) for key in found)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_tensors_that_transformers_ignores_are_told_of(tmp_path):
    tensors = save_case("deepseek_v3", tmp_path / "source")
    extra = {"model.layers.61.eh_proj.weight": torch.ones(2)}  # of multi-token prediction
    save_file(tensors | extra, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    done = to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    assert done.not_copied == (
        "1 tensors that transformers ignores (model.layers.61.eh_proj.weight)",
    )
    from_megatron(tmp_path / "megatron", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in found)


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    save_case("olmoe", tmp_path / "source")
    write, finished = torch_dist._write, []

    def write_some(chunks, out):
        if len(finished) >= 2:
            raise KeyboardInterrupt
        write(chunks, out)
        finished.append(chunks)

    monkeypatch.setattr(torch_dist, "_write", write_some)
    with pytest.raises(KeyboardInterrupt):
        to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    assert not (tmp_path / "megatron").exists()
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "megatron.partial").glob("*/*.distcp")}
    assert kept
    monkeypatch.undo()
    to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    inodes = {p.name: p.stat().st_ino for p in (tmp_path / "megatron").glob("*/*.distcp")}
    assert {name: inodes[name] for name in kept} == kept
    assert len(inodes) == NUM_LAYERS + 2
    from_megatron(tmp_path / "megatron", tmp_path / "hf")
    same_files(tmp_path / "source", tmp_path / "hf")


def refused_forward(tmp_path, kind, words):
    with pytest.raises(kind, match=words):
        to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_what_megatron_computes_otherwise_is_refused(tmp_path):
    save_tiny("mixtral", tmp_path / "source")
    refused_forward(tmp_path, ConfigError, "sliding_window=16")


def test_other_families_are_refused(tmp_path):
    save_tiny("ernie4_5_moe", tmp_path / "source")
    refused_forward(tmp_path, ConfigError, "model_type='ernie4_5_moe' .*there is one for .*olmoe")


def test_a_shared_expert_of_no_width_is_refused(tmp_path):
    build_tiny("qwen2_moe", shared_expert_intermediate_size=0).save_pretrained(tmp_path / "source")
    refused_forward(tmp_path, ConfigError, "shared expert of this qwen2_moe model has width 0")


def test_experts_fused_in_one_tensor_are_refused(tmp_path):
    tensors = save_case("olmoe", tmp_path / "source")
    for layer in range(NUM_LAYERS):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: torch.stack(
                [tensors.pop(f"{block}.{e}.{name}.weight") for e in range(NUM_EXPERTS)]
            )
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{block}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        tensors[f"{block}.down_proj"] = parts["down_proj"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    refused_forward(
        tmp_path, CheckpointError, "72 tensors are not there by the names .* on the hub"
    )


def test_layers_of_different_types_are_refused(tmp_path):
    tensors = save_case("olmoe", tmp_path / "source")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    words = "one tensor for all layers, but some are torch.float32 .* others torch.bfloat16"
    refused_forward(tmp_path, CheckpointError, words)


def test_a_matrix_of_different_types_is_refused(tmp_path):
    tensors = save_case("qwen3_moe", tmp_path / "source")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    words = r"linear_qkv.weight cannot be made of .* BF16 \[32\] and F32 \[32\]"
    refused_forward(tmp_path, CheckpointError, words)


def test_what_tells_of_an_older_checkpoint_is_not_copied(tmp_path):
    save_case("olmoe", tmp_path / "source")
    (tmp_path / "source" / "ds_moe_ep.json").write_text("{}")
    (tmp_path / "source" / "latest_checkpointed_iteration.txt").write_text("5")
    done = to_megatron(tmp_path / "source", tmp_path / "megatron", "te")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert verify_megatron(tmp_path / "megatron").num_files == done.num_files
    from_megatron(tmp_path / "megatron", tmp_path / "hf", tmp_path / "source")
    assert sorted(os.listdir(tmp_path / "hf")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_an_existing_target_is_refused(tmp_path, converted):
    for convert in (
        lambda: to_megatron(tmp_path / "source", tmp_path / "megatron", "te"),
        lambda: from_megatron(tmp_path / "megatron", tmp_path / "source"),
    ):
        with pytest.raises(CheckpointError, match="exists and is not empty: nothing was written"):
            convert()


def refused_back(tmp_path, words, kind=CheckpointError):
    with pytest.raises(kind, match=words):
        from_megatron(tmp_path / "megatron", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_without_a_config_it_does_not_go_back(tmp_path, converted):
    (tmp_path / "megatron" / "config.json").unlink()
    refused_back(tmp_path, "has no config.json: .* --config-from DIR")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", {"num_hidden_layers": 4}, r"weight is \[3, 32\], config.json says \[4, 32\] and"),
        ("olmoe", {"vocab_size": 97}, r"embeddings.weight is \[96, 32\], config.json says \[97\]"),
        ("olmoe", {"num_experts": 4}, r"router.weight is \[3, 8, 32\], config.json says \[3, 4\]"),
        ("olmoe", {"intermediate_size": 28}, r"fc1.weight is .*, config.json says \[3, 8, 56\]"),
        ("olmoe", {"num_key_value_heads": 4}, r"qkv.weight is \[3, 64, 32\], .* says \[3, 96\]"),
        ("olmoe", {"tie_word_embeddings": True}, "has 1 tensors that the model .*output_layer.wei"),
        ("mixtral", {"sliding_window": None}, "has 2 tensors that the model .*k_layernorm"),
        (
            "qwen3_moe",
            {"mlp_only_layers": []},
            "has 1 tensors that the model .*output_layer.weight",
        ),
        ("qwen2_moe", {"mlp_only_layers": []}, "qwen2_moe .* 4 of its tensors are missing: .*bias"),
        ("qwen2_moe", {}, r"of its tensors are missing: decoder.layers.0"),
    ],
)
def test_another_config_is_refused(family, changes, words, tmp_path, converted):
    build_tiny(family, **changes).config.save_pretrained(tmp_path / "megatron")
    refused_back(tmp_path, words)


def test_incomplete_or_corrupt(tmp_path, converted):
    release = tmp_path / "megatron" / "release"
    whole = {path.name: path.read_bytes() for path in release.iterdir()}

    def broken(name, content, words):
        path = release / name
        path.unlink() if content is None else path.write_bytes(content)
        refused_back(tmp_path, words)
        path.write_bytes(whole[name])

    name = "__0_2.distcp"
    broken(name, None, f"{name} is missing, .metadata says at least")
    broken(name, whole[name][:-9], f"{name} has .* bytes, .metadata says at least")
    broken(name, bytes(len(whole[name])), f"{name} .* is truncated")
    # Of a float, with what ends one item and begins the next: its place is not where it should be.
    broken(name, whole[name][64:] + bytes(64), f"{name}.* is (truncated|corrupt)")
    broken("metadata.json", None, "no whole checkpoint of Megatron's: metadata.json")
    broken("metadata.json", b'{"sharded_backend": "zarr"}', "is of format 'zarr'; only torch_dist")
    broken(".metadata", None, ".metadata cannot be read")
    broken(".metadata", whole[".metadata"][:999], ".metadata is corrupt")
    broken(".metadata", pickle.dumps({}), ".metadata is corrupt")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("../source")
    refused_back(tmp_path, "names '../source', but .* is no folder of this checkpoint")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("release")
    from_megatron(tmp_path / "megatron", tmp_path / "hf")


def rewrite_metadata(release, change):
    path = release / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def test_a_part_that_is_not_there(tmp_path, converted):
    key = "decoder.layers.mlp.router.weight"

    def lose(content):
        del content.state_dict_metadata[key].chunks[1]

    rewrite_metadata(tmp_path / "megatron" / "release", lose)
    refused_back(tmp_path, rf"row 0 of {key} at \[1\] is in none of its files")


def test_a_place_outside_of_the_folder(tmp_path, converted):
    (tmp_path / "megatron" / "outside.distcp").write_bytes(b"")

    def leave(content):
        index = MetadataIndex("output_layer.weight", (0, 0))
        content.storage_data[index] = _StorageInfo("../outside.distcp", 0, 1)

    rewrite_metadata(tmp_path / "megatron" / "release", leave)
    refused_back(tmp_path, "names a file outside of its folder, '../outside.distcp'")


def test_columns_of_tensor_parallel_ranks_are_refused(tmp_path, converted):
    def cut(content):
        for chunk in content.state_dict_metadata["output_layer.weight"].chunks:
            chunk.sizes = torch.Size([96, 16])

    rewrite_metadata(tmp_path / "megatron" / "release", cut)
    refused_back(tmp_path, r"output_layer.weight \[96, 32\] was saved in columns, .* \[96, 16\]")


def test_any_damage_to_the_metadata_is_refused_or_harmless(tmp_path, converted):
    path = tmp_path / "megatron" / "release" / ".metadata"
    whole, pick, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(pick.choice([1, 1, 2, 8])):
            damaged[pick.randrange(len(damaged))] = pick.randrange(256)
        path.write_bytes(damaged)
        try:
            open_torch_dist(tmp_path / "megatron")
        except CheckpointError:
            refused += 1
    assert 100 < refused < 200


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_is_not_run(tmp_path, converted):
    trap = tmp_path / "trap"
    rewrite_metadata(
        tmp_path / "megatron" / "release", lambda c: setattr(c, "planner_data", Malicious(trap))
    )
    refused_back(
        tmp_path, "more than a list of tensors: it asks for posix.mkdir, which can run code"
    )
    assert not trap.exists()


def calling(module, name, argument):
    """A pickle of protocol 4 that calls `name`, which may be dotted, of a module."""
    word, attribute, given = (
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
        for text in (module, name, str(argument))
    )
    called = word + attribute + pickle.STACK_GLOBAL + given + pickle.TUPLE1 + pickle.REDUCE
    return pickle.PROTO + b"\4" + called + pickle.STOP


@pytest.mark.parametrize("module", ["metadata", "filesystem", "planner"])
def test_a_dotted_name_reaches_no_code_from_a_module_that_is_let_in(tmp_path, converted, module):
    content = calling(f"torch.distributed.checkpoint.{module}", "os.mkdir", tmp_path / "trap")
    if hasattr(getattr(dcp, module), "os"):
        pickle.loads(content)  # what torch's reader would do
        (tmp_path / "trap").rmdir()
    (tmp_path / "megatron" / "release" / ".metadata").write_bytes(content)
    with mock.patch.object(dcp.FileSystemReader, "read_metadata", side_effect=AssertionError):
        refused_back(
            tmp_path,
            rf"\.metadata holds more than a list of tensors: it asks for \S*\.{module}\.os\.mkdir, "
            "which can run code. None was run",
        )
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.state_dict_loader", "load"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.planner", "WriteItemType.__class__"),
        ("megatron.core.dist_checkpointing.serialization", "load"),
        ("torch", "float32.__class__"),
        ("torch", "int_repr"),
        ("torch", "bool.__class__.__subclasses__"),
    ],
)
def test_only_names_that_are_written_are_let_in(tmp_path, converted, module, name):
    (tmp_path / "megatron" / "release" / ".metadata").write_bytes(calling(module, name, "x"))
    refused_back(tmp_path, f"it asks for {module}.{name}, which can run code")


def by_name(member, protocol):
    """Pickles a member of an enum as Python 3.11.2 does."""
    return getattr, (type(member), member.name)


def test_enums_that_are_pickled_by_name_are_read_and_never_written(tmp_path, converted):
    path = tmp_path / "megatron" / "release" / ".metadata"
    by_value = path.read_bytes()
    with mock.patch.object(enum.Enum, "__reduce_ex__", by_name):
        to_megatron(tmp_path / "source", tmp_path / "again", "local")
        rewrite_metadata(path.parent, lambda c: setattr(c, "planner_data", [*WriteItemType]))
    assert (tmp_path / "again" / "release" / ".metadata").read_bytes() == by_value
    assert b"getattr" in path.read_bytes() and b"getattr" not in by_value
    from_megatron(tmp_path / "megatron", tmp_path / "hf")
    same_files(tmp_path / "source", tmp_path / "hf")


class Getting:
    def __init__(self, *given):
        self.given = given

    def __reduce__(self):
        return getattr, self.given


@pytest.mark.parametrize(
    "given",
    [
        (WriteItemType, "__class__"),
        (WriteItemType, "TORCH_CHANNELS_LAST"),
        (WriteItemType, "TENSOR", None),
        (WriteItemType.TENSOR, "SHARD"),
        (MetadataIndex, "TENSOR"),
        (MetadataIndex, "__init__"),
        (Getting(WriteItemType, "TENSOR"), "__class__"),
        (getattr, "__self__"),
        ("text", "TENSOR"),
        (WriteItemType, ["TENSOR"]),
    ],
)
def test_nothing_but_members_of_enums_is_taken_by_name(tmp_path, converted, given):
    rewrite_metadata(
        tmp_path / "megatron" / "release", lambda c: setattr(c, "planner_data", Getting(*given))
    )
    refused_back(tmp_path, r"it asks for builtins\.getattr, which can run code\. None was run")


def test_code_in_place_of_a_tensor_is_not_run(tmp_path, converted):
    trap = tmp_path / "trap"
    buffer = io.BytesIO()
    torch.save(Malicious(trap), buffer)
    release = tmp_path / "megatron" / "release"
    (release / "evil.distcp").write_bytes(buffer.getvalue())

    def put(content):
        index = MetadataIndex("output_layer.weight", (0, 0))
        content.storage_data[index] = _StorageInfo("evil.distcp", 0, len(buffer.getvalue()))

    rewrite_metadata(release, put)
    refused_back(tmp_path, "evil.distcp holds more than tensors: it asks for posix.mkdir")
    assert not trap.exists()


def test_common_state_is_not_read(tmp_path, converted):
    (tmp_path / "megatron" / "release" / "common.pt").write_bytes(
        pickle.dumps(Malicious(tmp_path / "trap"))
    )
    from_megatron(tmp_path / "megatron", tmp_path / "hf")
    assert not (tmp_path / "trap").exists()
    with pytest.raises(CheckpointError, match=r"1 of \d+ files are corrupt .*: release/common.pt"):
        verify_megatron(tmp_path / "megatron")


def test_a_wrong_record(tmp_path, converted):
    path = tmp_path / "megatron" / "ds_moe_ep.json"
    whole = path.read_text()
    for text, words in (
        (whole[:99], "ds_moe_ep.json: cannot be read"),
        (whole.replace("release/__0_1", "../__0_1"), "is not the path of a file in this folder"),
        (whole.replace('"version": 1', '"version": 2'), "written by a newer ds_moe_ep"),
    ):
        path.write_text(text)
        refused_back(tmp_path, words)
        with pytest.raises(CheckpointError, match=words):
            verify_megatron(tmp_path / "megatron")
    path.write_text(whole)
    with pytest.raises(CheckpointError, match=f"Name the folder above, {path.parent}."):
        verify_megatron(path.parent / "release")
    path.unlink()
    with pytest.raises(CheckpointError, match="has no ds_moe_ep.json, so there is nothing to comp"):
        verify_megatron(tmp_path / "megatron")
    from_megatron(tmp_path / "megatron", tmp_path / "hf")


def test_other_commands_tell_what_it_is(tmp_path, converted):
    for convert in (to_expert_sharded, to_hugging_face):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(CheckpointError):
            convert(tmp_path / "megatron", tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="is a checkpoint of Megatron. To make a Hugging Face"
    ):
        to_expert_sharded(tmp_path / "megatron", tmp_path / "out")


def test_the_command(tmp_path, capsys):
    save_case("qwen2_moe", tmp_path / "source")
    source, target, back = (str(tmp_path / name) for name in ("source", "megatron", "hf"))
    assert main(["convert", source, target, "--to", "megatron", "--ckpt", "torch_dist"]) == 0
    assert json.loads((tmp_path / "megatron/ds_moe_ep.json").read_text())["target_spec"] == "te"
    assert main(["convert", target, "--verify"]) == 0
    assert main(["convert", f"{target}/release", back, "--to", "hf", "--config-from", source]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {target}: 12 files, ")
    assert main(["convert", f"{target}/release", f"{back}2", "--to", "hf"]) == 2
    assert capsys.readouterr().err.startswith("CheckpointError: ")


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (
            ["--to", "ep", "--target-spec", "te"],
            "--target-spec and --ckpt are for --to megatron only",
        ),
        (["--to", "hf", "--ckpt", "torch_dist"], "--target-spec and --ckpt are for --to megatron"),
        (["--to", "ep", "--config-from", "x"], "--config-from is for --to hf only"),
        (
            ["--to", "hf", "--config-from", "x"],
            "--config-from is for checkpoints of Megatron, which",
        ),
        (["--to", "megatron", "--ckpt", "zarr"], "invalid choice: 'zarr'"),
        (["--to", "megatron", "--ep-size", "2"], "--ep-size is for --to ep only"),
    ],
)
def test_options_that_do_not_fit(words, refusal, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(tmp_path), str(tmp_path / "out"), *words])
    assert exit_.value.code == 2
    assert refusal in capsys.readouterr().err
