"""What memory a conversion to Megatron's format and back takes, and that it imports no Megatron.

That all bytes are right is tested for every family in tests/unit/test_convert_megatron.py.
"""

import filecmp
import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig

from tests.helpers import run_command

# The process tells its own highest resident set, in which mapped files count too. What its parent
# is told of it, ru_maxrss, is the parent's own where that is more: the process began as a copy.
_PROGRAM = """
import json, sys
from ds_moe_ep.cli import main
code = main(["convert", *sys.argv[1:]])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
megatron = sorted(name for name in sys.modules if name.split(".")[0] == "megatron")
print(json.dumps([int(status["VmHWM"].split()[0]) << 10, megatron]))
sys.exit(code)
"""

# As wide as OLMoE-1B-7B, but with fewer layers and experts.
_WIDE = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024}
_NARROW = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32}
_SAME = {"num_hidden_layers": 3, "num_experts": 28, "num_attention_heads": 16, "eos_token_id": 2}
_ELEMENT_BYTES = 2  # of bfloat16


def shapes_of_layer(config):
    hidden, width = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    shapes |= dict.fromkeys(norms, (hidden,))
    shapes["mlp.gate"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (width, hidden)
        shapes[f"mlp.experts.{expert}.up_proj"] = (width, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, width)
    return shapes


def save_random(folder, sizes):
    """Writes the folder `source` of random bytes, a file a layer and one for what is in none."""
    source = folder / "source"
    config = OlmoeConfig(**_SAME, **sizes, dtype="bfloat16")
    config.save_pretrained(source)
    files = [
        {f"model.layers.{n}.{name}": shape for name, shape in shapes_of_layer(config).items()}
        for n in range(config.num_hidden_layers)
    ]
    vocabulary = (config.vocab_size, config.hidden_size)
    files.append({"model.embed_tokens": vocabulary, "model.norm": vocabulary[1:]})
    files[-1]["lm_head"] = vocabulary
    weight_map = {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            f"{key}.weight": torch.empty(shape, dtype=torch.int16).random_().view(torch.bfloat16)
            for key, shape in shapes.items()
        }
        save_file(tensors, source / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def convert(*args):
    """Converts in a process of its own, and returns the most memory that was resident in it."""
    done = run_command([sys.executable, "-c", _PROGRAM, *args], timeout_s=300)
    assert done.returncode == 0, done.stderr
    peak_bytes, megatron = json.loads(done.stdout.splitlines()[-1])
    assert megatron == []
    return peak_bytes


def there_and_back(folder):
    there = convert(folder / "source", folder / "megatron", "--to", "megatron")
    back = convert(folder / "megatron", folder / "back", "--to", "hf")
    return {"there": there, "back": back}


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep until the third run after this


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the highest resident set")
def test_a_conversion_holds_less_than_a_layer(folder):
    # As many tensors in as many files, but next to no bytes: what is needed beside weights.
    save_random(folder / "narrow", _NARROW)
    at_rest = there_and_back(folder / "narrow")
    config = save_random(folder / "wide", _WIDE)
    peaks = there_and_back(folder / "wide")
    source, back = folder / "wide" / "source", folder / "wide" / "back"
    files = sorted(path.name for path in source.glob("*.safetensors"))
    model_bytes = sum((source / name).stat().st_size for name in files)
    layer_bytes = _ELEMENT_BYTES * sum(map(math.prod, shapes_of_layer(config).values()))
    print(f"\nmodel {model_bytes >> 20} MiB, layer {layer_bytes >> 20} MiB")
    for way, peak_bytes in peaks.items():
        print(f"{way}: at most {peak_bytes >> 20} MiB, without weights {at_rest[way] >> 20} MiB")
    for way, peak_bytes in peaks.items():
        assert peak_bytes < at_rest[way] + layer_bytes
        assert peak_bytes < model_bytes / 2
    assert filecmp.cmpfiles(source, back, files, shallow=False) == (files, [], [])
