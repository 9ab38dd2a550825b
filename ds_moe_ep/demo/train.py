"""Trains the bundled model: the OLMoE architecture, very thin, on one public-domain book.

Owns the tokenizer, the model's shape, the training loop and the two figures that the result is
judged by (bits per byte of held-out text, balance of the experts). Handing the finished model to a
user is `ds_moe_ep.demo.write_demo_model`.

    python -m ds_moe_ep.demo.train --out my-model
"""

import argparse
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from ds_moe_ep.errors import CheckpointError

__all__ = [
    "Evaluation",
    "Recipe",
    "build_model",
    "build_tokenizer",
    "evaluate",
    "read_book",
    "split_held_out",
    "train",
]

TEXT_FILE = Path(__file__).with_name("alice.txt")
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
HIDDEN_SIZE = 64
WINDOW_TOKENS = 256  # a training sample, and the context: what is longer was never seen
HELD_OUT_SHARE = 0.05
CHECKPOINT_EVERY_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; the defaults made the bundled weights."""

    steps: int = 1500
    batch: int = 8  # windows per step
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    corrupted_share: float = 0.05
    seed: int = 1865


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text, and which experts it uses on it."""

    bits_per_byte: float
    tokens_per_expert: Tensor  # [num_layers, num_experts]

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean of its layer, in the worst layer."""
        load = self.tokens_per_expert.float()
        return (load.max(dim=1).values / load.mean(dim=1)).max().item()

    @property
    def num_idle_experts(self) -> int:
        """Experts that received no token, in all layers together."""
        return int((self.tokens_per_expert == 0).sum())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer whose token id is the byte's value, with two special tokens after them."""
    # ByteLevel spells a byte that is a printable Latin-1 character as that character, and the n-th
    # of the other bytes as chr(256 + n).
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    spelling = [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]
    vocab = {character: byte for byte, character in enumerate(spelling)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """Builds the untrained model in fp32; torch's global seed decides its weights."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=WINDOW_TOKENS,
        initializer_range=HIDDEN_SIZE**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        # The blocks' outputs are summed over the layers: keep the sum in bounds. Experts start out
        # weighted by about 1/64 each, attention does not.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def read_book(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Reads the book as token ids `[N]`, with an end-of-text token in place of each blank line.

    A paragraph is a document to the model, so a completion stops where a paragraph would. A byte
    is its own token id.
    """
    paragraphs = TEXT_FILE.read_bytes().strip().split(b"\n\n")
    documents = [[*paragraph, tokenizer.eos_token_id] for paragraph in paragraphs]
    return torch.tensor([token for document in documents for token in document])


def split_held_out(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts the end of the book off: `(training tokens, held-out tokens)`."""
    cut = round(len(tokens) * (1 - HELD_OUT_SHARE))
    return tokens[:cut], tokens[cut:]


def draw_batch(tokens: Tensor, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Draws the windows of one step, which depend on seed and step alone.

    Some input bytes are replaced by others of the book. That keeps a model this large from learning
    a book this small by heart, and prepares it for its own mistakes.

    Returns:
        Inputs and targets (the next token at each place), both `[batch, WINDOW_TOKENS]`.
    """
    generator = torch.Generator().manual_seed(recipe.seed + step)
    starts = torch.randint(len(tokens) - WINDOW_TOKENS, (recipe.batch, 1), generator=generator)
    windows = tokens[starts + torch.arange(WINDOW_TOKENS + 1)]
    inputs, targets = windows[:, :-1], windows[:, 1:]
    corrupted = torch.rand(inputs.shape, generator=generator) < recipe.corrupted_share
    noise = tokens[torch.randint(len(tokens), inputs.shape, generator=generator)]
    return torch.where(corrupted, noise, inputs), targets


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rises linearly, then falls along a cosine to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * warmup * (0.05 + 0.95 * cosine)


def compute_loss(
    model: OlmoeForCausalLM, inputs: Tensor, targets: Tensor, balance_weight: float
) -> tuple[Tensor, Tensor]:
    """Returns the loss to descend and, in it, the next-token cross entropy in nats."""
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    prediction_loss = cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    # OlmoeForCausalLM would balance an expert's sum over all layers; here each layer is balanced.
    config = model.config
    balance_losses = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return prediction_loss + balance_weight * torch.stack(balance_losses).mean(), prediction_loss


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, tokens: Tensor) -> Evaluation:
    """Evaluates a model on tokens `[N]` in windows as long as those it was trained on.

    The end of a paragraph counts as one byte; what is left over after the last window is ignored.
    """
    config = model.config
    windows = tokens.unfold(0, WINDOW_TOKENS + 1, WINDOW_TOKENS)
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
    nats = 0.0
    for window in windows:
        output = model(input_ids=window[None, :-1], use_cache=False, output_router_logits=True)
        nats += cross_entropy(output.logits[0].float(), window[1:], reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return Evaluation(nats / math.log(2) / (len(windows) * WINDOW_TOKENS), counts)


def build_optimizer(model: OlmoeForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """Builds AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": scales, "weight_decay": 0}],
        betas=(0.9, 0.98),
        fused=True,
    )


def train(recipe: Recipe, tokens: Tensor, held_out: Tensor, checkpoint: Path) -> OlmoeForCausalLM:
    """Trains a model in fp32, going on from `checkpoint` where a run of this recipe was cut.

    Args:
        recipe: The settings of the run.
        tokens: Token ids to learn from, `[N]`.
        held_out: Token ids to report on at each checkpoint, `[M]`.
        checkpoint: File for the run's state, written on the way.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(build_tokenizer())
    optimizer = build_optimizer(model, recipe.weight_decay)
    done_steps = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        if state["recipe"] != asdict(recipe):
            raise CheckpointError(
                f"{checkpoint} was written with {state['recipe']}, not with {asdict(recipe)}. "
                "Give the same flags to go on with that run, or remove the file to start anew."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done_steps = state["done_steps"]

    started = time.monotonic()
    bits = []  # per byte, of the steps since the last report
    for step in range(done_steps, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        inputs, targets = draw_batch(tokens, recipe, step)
        loss, prediction_loss = compute_loss(model, inputs, targets, recipe.balance_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bits.append(prediction_loss.item() / math.log(2))
        if (step + 1) % CHECKPOINT_EVERY_STEPS == 0 or step + 1 == recipe.steps:
            report(step + 1, bits, evaluate(model, held_out), time.monotonic() - started)
            bits.clear()
            state = {"recipe": asdict(recipe), "done_steps": step + 1}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(state, checkpoint)
    return model


def report(step: int, bits: list[float], evaluation: Evaluation, seconds: float) -> None:
    """Prints one line on the state of the training."""
    print(
        f"step {step}: {sum(bits) / len(bits):.3f} bits per byte in training, "
        f"{evaluation.bits_per_byte:.3f} held out; busiest expert {evaluation.imbalance:.2f} times "
        f"the mean, {evaluation.num_idle_experts} idle; {seconds:.0f} s",
        flush=True,
    )


def write_checkpoint(state: dict[str, object], checkpoint: Path) -> None:
    """Replaces the checkpoint in one go, so that a cut leaves the old or the new one."""
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def save_model(model: OlmoeForCausalLM, out: Path) -> None:
    """Writes model and tokenizer as a Hugging Face directory, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    build_tokenizer().save_pretrained(partial)
    partial.replace(out)


def main() -> None:
    """Trains with the given flags, evaluates the weights as they are stored and saves them."""
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to make")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch, help="windows per step")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a new folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    recipe = Recipe(steps=args.steps, batch=args.batch, seed=args.seed)
    tokens, held_out = split_held_out(read_book(build_tokenizer()))
    checkpoint = args.out.with_name(args.out.name + ".checkpoint.pt")
    try:
        model = train(recipe, tokens, held_out, checkpoint)
    except CheckpointError as error:
        parser.exit(error.exit_code, f"CheckpointError: {error}\n")
    model.to(torch.bfloat16)
    save_model(model, args.out)
    checkpoint.unlink()
    evaluation = evaluate(model.float(), held_out)
    print(f"{args.out}: {evaluation.bits_per_byte:.3f} bits per byte held out, rounded to bfloat16")


if __name__ == "__main__":
    main()
