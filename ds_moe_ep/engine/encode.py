"""Turns prompts into tokens, and refuses those that a model cannot take.

Files of prompts are read in prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.tasks import EncodedPrompt
from ds_moe_ep.errors import InputError

__all__ = ["check_tokens", "encode", "read_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_tokenizer(
    model: Path, prompts: Sequence[Prompt], source: Path | None
) -> PreTrainedTokenizerBase | None:
    """Reads a model's tokenizer.

    Args:
        model: The folder of the model.
        prompts: What it is for.
        source: The file that they are from.

    Returns:
        It; None if there is none and every prompt is given as token ids.

    Raises:
        InputError: There is none and a prompt is text, or it cannot be read.
    """
    if any((model / name).exists() for name in _TOKENIZER_FILES):
        try:
            return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())  # on a line
            raise InputError(f"{model}: the tokenizer cannot be read: {reason}") from error
    text = next((prompt for prompt in prompts if prompt.text is not None), None)
    if text is None:
        return None
    raise InputError(
        f"{source}: prompt {text.id!r} is text, but {model} has no tokenizer "
        f"({', '.join(_TOKENIZER_FILES)}). "
        "Add the tokenizer's files, or give prompt_token_ids."
    )


def encode(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None
) -> list[EncodedPrompt]:
    """Returns prompts with their tokens, in their order.

    Args:
        prompts: The prompts.
        tokenizer: The model's; None if no prompt is text.
    """
    texts = [prompt.text for prompt in prompts if prompt.text is not None]
    encoded = iter(tokenizer(texts)["input_ids"]) if tokenizer is not None and texts else iter(())
    return [EncodedPrompt(prompt, prompt.token_ids or tuple(next(encoded))) for prompt in prompts]


def check_tokens(
    prompts: Sequence[EncodedPrompt],
    *,
    source: Path | None,
    model: Path,
    vocab_size: int,
    context_length: int,
    generates: bool = False,
) -> None:
    """Refuses prompts without tokens, with too many, or with some that the model does not have.

    Args:
        prompts: The prompts.
        source: The file that they are from.
        model: The model, for messages.
        vocab_size: How many tokens it knows.
        context_length: How many it takes at once.
        generates: Whether one more is to be generated at least.

    Raises:
        InputError: Names the first of them.
    """
    room = context_length - (1 if generates else 0)
    for encoded in prompts:
        where = f"{source}: prompt {encoded.prompt.id!r}"
        if not encoded.token_ids:
            raise InputError(f"{where} has no tokens. Remove it.")
        if len(encoded.token_ids) > room:
            raise InputError(
                f"{where} has {len(encoded.token_ids):,} tokens, but the context of "
                f"{model} is {context_length:,}"
                f"{' and at least one is to be generated' if generates else ''}. "
                f"Shorten it to {room:,}."
            )
        if max(encoded.token_ids) >= vocab_size:
            raise InputError(
                f"{where} has token id {max(encoded.token_ids)}, but the vocabulary of "
                f"{model} ends at {vocab_size - 1}."
            )
