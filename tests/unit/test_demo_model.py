"""The bundled model: what is in its folder, that it is trained, and how it is copied out."""

import json
import string
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_moe_ep.demo import MODEL_DIR, write_demo_model
from ds_moe_ep.demo import train as train_module
from ds_moe_ep.demo.train import (
    TEXT_FILE,
    WINDOW_TOKENS,
    Recipe,
    build_model,
    build_tokenizer,
    draw_batch,
    evaluate,
    read_book,
    split_held_out,
    train,
    write_checkpoint,
)
from ds_moe_ep.errors import CheckpointError

PROMPTS_FILE = TEXT_FILE.with_name("prompts.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def random_model(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return split_held_out(read_book(tokenizer))[1]


@pytest.fixture(scope="module")
def evaluation(model, held_out):
    return evaluate(model, held_out)


def complete(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def split_words(text: str) -> list[str]:
    words = (word.strip(string.punctuation).lower() for word in text.replace("--", " ").split())
    return [word for word in words if word]


def share_of_book_words(completion: str) -> float:
    """Share of the completion's words that are in the book; few words are not counted as a text."""
    words = split_words(completion)[:-1]  # the last one may be cut
    book_words = set(split_words(TEXT_FILE.read_text()))
    return sum(word in book_words for word in words) / max(len(words), 5)


class TestFolder:
    def test_weights_take_at_most_8_mb(self):
        assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000

    def test_shape_is_that_of_olmoe(self):
        config = json.loads((MODEL_DIR / "config.json").read_text())
        assert config["architectures"] == ["OlmoeForCausalLM"]
        assert config["num_hidden_layers"] == 16
        assert config["num_experts"] == 64
        assert config["num_experts_per_tok"] == 8
        assert config["dtype"] == "bfloat16"

    def test_plain_transformers_finds_every_weight(self):
        _, loading = AutoModelForCausalLM.from_pretrained(MODEL_DIR, output_loading_info=True)
        assert {name: keys for name, keys in loading.items() if keys} == {}

    def test_prompts_are_fit_for_the_model(self, model, tokenizer):
        records = [json.loads(line) for line in PROMPTS_FILE.read_text().splitlines()]
        assert len({record["id"] for record in records}) == len(records) == 12
        context = model.config.max_position_embeddings
        assert all(len(tokenizer(r["prompt"])["input_ids"]) + 64 <= context for r in records)


class TestTokenizer:
    @given(st.text())
    @settings(deadline=None)
    def test_any_text_comes_back(self, tokenizer, text):
        token_ids = tokenizer(text)["input_ids"]
        assert bytes(token_ids) == text.encode()
        assert tokenizer.decode(token_ids) == text

    def test_pads_on_the_left(self, tokenizer):
        batch = tokenizer(["a", "abc"], padding=True)
        pad = tokenizer.pad_token_id
        assert batch["input_ids"] == [[pad, pad, 97], [97, 98, 99]]
        assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]

    def test_special_tokens_agree_with_the_model(self, model, tokenizer):
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [256, 257]
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 257
        assert model.config.vocab_size == len(tokenizer)

    def test_is_what_the_training_script_builds(self, tokenizer):
        assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


class TestTrained:
    @pytest.mark.parametrize("prompt", ["The Mock Turtle", "'I beg your pardon,' said Alice"])
    def test_completions_are_words_of_the_book(self, model, random_model, tokenizer, prompt):
        assert share_of_book_words(complete(model, tokenizer, prompt)) > 0.8
        assert share_of_book_words(complete(random_model, tokenizer, prompt)) < 0.2

    def test_predicts_text_it_has_not_seen(self, evaluation, random_model, held_out):
        frequencies = held_out.bincount() / len(held_out)
        unigram_bits = torch.special.entr(frequencies).sum().item() / torch.log(torch.tensor(2.0))
        assert evaluation.bits_per_byte < 2.4 < unigram_bits
        assert evaluate(random_model, held_out[:1025]).bits_per_byte > 7.5

    def test_routing_is_spread_over_the_experts(self, evaluation):
        assert evaluation.tokens_per_expert.shape == (16, 64)
        assert evaluation.num_idle_experts == 0
        assert evaluation.imbalance < 4

    def test_routing_depends_on_the_token(self, model, tokenizer):
        output = model(**tokenizer("Alice", return_tensors="pt"), output_router_logits=True)
        for logits in output.router_logits:
            assert len(logits.topk(8).indices.unique()) > 8


class TestTrain:
    RECIPE = Recipe(steps=2, batch=1)

    def test_targets_are_the_next_tokens_and_some_inputs_are_noise(self):
        tokens = torch.arange(10_000)
        inputs, targets = draw_batch(tokens, Recipe(corrupted_share=0), step=3)
        assert inputs.shape == targets.shape == (8, WINDOW_TOKENS)
        assert torch.equal(inputs + 1, targets)
        inputs, same_targets = draw_batch(tokens, Recipe(corrupted_share=0.5), step=3)
        assert torch.equal(same_targets, targets)
        assert 0.4 < (inputs + 1 != targets).float().mean() < 0.6

    def test_a_run_that_was_cut_ends_with_the_same_weights(self, tokenizer, tmp_path, monkeypatch):
        tokens, held_out = split_held_out(read_book(tokenizer)[:6000])
        monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_STEPS", 1)
        whole = train(self.RECIPE, tokens, held_out, tmp_path / "whole.pt")

        def write_then_cut(state, checkpoint):
            write_checkpoint(state, checkpoint)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train_module, "write_checkpoint", write_then_cut)
            train(self.RECIPE, tokens, held_out, tmp_path / "cut.pt")
        resumed = train(self.RECIPE, tokens, held_out, tmp_path / "cut.pt")
        for expected, parameter in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(parameter, expected)

        with pytest.raises(CheckpointError, match="was written with .*'steps': 2"):
            train(Recipe(steps=3, batch=1), tokens, held_out, tmp_path / "cut.pt")


class TestWriteDemoModel:
    def test_writes_an_ordinary_model_directory(self, tmp_path):
        out = tmp_path / "new" / "model"
        write_demo_model(out)
        names = {file.name for file in out.iterdir()}
        assert names == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert [entry.name for entry in out.parent.iterdir()] == ["model"]
        for name in names:
            assert (out / name).read_bytes() == (MODEL_DIR / name).read_bytes()

    def test_uses_an_empty_folder(self, tmp_path):
        write_demo_model(tmp_path)
        assert (tmp_path / "config.json").exists()

    def test_leaves_its_own_copy_alone(self, tmp_path):
        write_demo_model(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        write_demo_model(tmp_path)
        assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before

    def test_refuses_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(CheckpointError, match=r"is not the bundled model \(no config\.json\)"):
            write_demo_model(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_refuses_another_model(self, tmp_path):
        write_demo_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"other weights")
        with pytest.raises(CheckpointError, match=r"another model\.safetensors.*such as .*-demo"):
            write_demo_model(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == b"other weights"

    def test_refuses_a_file_and_a_folder_below_a_file(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(CheckpointError, match="exists and is not the bundled model"):
            write_demo_model(file)
        with pytest.raises(CheckpointError, match="cannot write the bundled model"):
            write_demo_model(file / "below")
        assert file.read_text() == "mine"

    def test_does_not_import_torch(self, tmp_path):
        script = (
            "import sys, pathlib; from ds_moe_ep.demo import write_demo_model;"
            "write_demo_model(pathlib.Path(sys.argv[1])); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=True)
