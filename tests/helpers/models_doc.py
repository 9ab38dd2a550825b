"""Writes docs/models.md from what a run of tests/parity/test_families.py saw."""

from collections.abc import Mapping
from dataclasses import dataclass

import transformers

from ds_moe_ep.model_families import UNSUPPORTED

__all__ = ["FamilyResult", "render_models_doc"]

_HEAD = """# Models

Written by `pytest tests/parity --write-models-doc`; a test keeps it true. Do not edit it by hand.

A family passes at an ep_size when a tiny random model of it, loaded from safetensors with each
rank's own experts and swapped, gives what Hugging Face gives in one process with transformers
{version} on CPU in float32: outputs of every router and every MoE block and the logits within
rtol {rtol:g} and atol {atol:g} (times the largest value of the tensor, where that is above 1),
and the same greedy tokens, with uneven prompts on the ranks. Multimodal families are run with text
alone.

Tokens do not depend on the batch or the rank that a prompt lands in, but for models with `longrope`
rotary positions (as phimoe can have): transformers takes the frequencies for long prompts, for a
whole batch, from the first pass on that has a position beyond `original_max_position_embeddings`.
With `--batch-size 1` each prompt has its own.
DeepSeek-V4 and MiniMax-M3 attend to blocks of tokens by their place in a row, padding included:
only prompts of one length share a batch of theirs.

Parameters counted `exactly` are known part by part for the family, and counted as transformers
does; `estimated` means that those outside the routed experts are counted for the usual block.

## What passed

| family | model_type | architecture | features | ep_size | parameters |
|---|---|---|---|---|---|
"""
_REFUSED = """
## What is refused

| model_type | reason |
|---|---|
"""


@dataclass
class FamilyResult:
    """What a run saw of a family.

    Attributes:
        family: Folder of transformers that it lives in.
        architecture: Class of the model.
        features: What is special about it.
        params_are_exact: Whether all of its parameters are counted, not estimated.
        passed: The ep_sizes at which it equalled Hugging Face.
    """

    family: str
    architecture: str
    features: list[str]
    params_are_exact: bool
    passed: set[int]


def render_models_doc(
    results: Mapping[str, FamilyResult],
    *,
    rtol: float,
    atol: float,
) -> str:
    """Returns the page.

    Args:
        results: What was seen, by model_type.
        rtol: Relative tolerance of the comparison.
        atol: Absolute tolerance of the comparison.
    """
    passed = "".join(
        f"| {seen.family} | {model_type} | {seen.architecture} "
        f"| {', '.join(seen.features) or 'none'} "
        f"| {', '.join(map(str, sorted(seen.passed)))} "
        f"| {'exactly' if seen.params_are_exact else 'estimated'} |\n"
        for model_type, seen in sorted(results.items())
    )
    head = _HEAD.format(version=transformers.__version__, rtol=rtol, atol=atol)
    return head + passed + _REFUSED + _reasons(UNSUPPORTED)


def _reasons(reasons: Mapping[str, str]) -> str:
    return "".join(f"| {name} | {reason} |\n" for name, reason in sorted(reasons.items()))
