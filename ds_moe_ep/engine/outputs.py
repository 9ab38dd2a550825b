"""The results of a job: what a line holds, and the file of all.

It does not gather results from ranks and knows nothing of models.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_moe_ep.errors import ResourceError
from ds_moe_ep.whole_file import write_lines

__all__ = [
    "GenerateResult",
    "ScoreResult",
    "Result",
    "write_results",
]


@dataclass(frozen=True)
class GenerateResult:
    """What a model wrote after one prompt.

    Attributes:
        id: The prompt's id.
        prompt: The prompt's text, or None if it was given as token ids; the line then has no key
            for it.
        token_ids: The new tokens, without the prompt's.
        completion: Their text, or None (null in the file) for a model without a tokenizer.
        finish_reason: "stop" after an end-of-sequence token, "length" at the limit of new tokens.
    """

    id: str
    prompt: str | None
    token_ids: tuple[int, ...]
    completion: str | None
    finish_reason: Literal["stop", "length"]

    def to_json_line(self) -> str:
        """Returns the result as a line of JSON, with its line end."""
        record: dict[str, Any] = {"id": self.id}
        if self.prompt is not None:
            record["prompt"] = self.prompt
        record["token_ids"] = self.token_ids
        record["completion"] = self.completion
        record["finish_reason"] = self.finish_reason
        return _json_line(record)


@dataclass(frozen=True)
class ScoreResult:
    """How likely a model finds one prompt.

    Attributes:
        id: The prompt's id.
        num_tokens: Number of tokens of the prompt.
        logprob: Sum of `token_logprobs`.
        token_logprobs: ln P(token | tokens before it) of every token but the first, which has
            none before it: num_tokens - 1 numbers.
    """

    id: str
    num_tokens: int
    logprob: float
    token_logprobs: tuple[float, ...]

    def to_json_line(self) -> str:
        """Returns the result as a line of JSON, with its line end.

        JSON has no infinity and no NaN: a number that is not finite becomes null.
        """
        return _json_line(
            {
                "id": self.id,
                "num_tokens": self.num_tokens,
                "logprob": _finite(self.logprob),
                "token_logprobs": [_finite(value) for value in self.token_logprobs],
            }
        )


Result = GenerateResult | ScoreResult


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes results as JSONL, in their order, as `whole_file.write_lines` does.

    Args:
        path: The file; `whole_file.check_writable` says beforehand whether it can be written.
        results: One a line.

    Raises:
        ResourceError: The disk is full, say, or the folder has gone.
    """
    try:
        write_lines(path, (result.to_json_line() for result in results))
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}). Make room, or bring the folder back."
        ) from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
