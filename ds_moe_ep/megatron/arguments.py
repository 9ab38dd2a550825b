"""Reads a file of Megatron arguments, and has Megatron's own parser and checks take them.

What the arguments mean is Megatron's part; which ones a model needs is in config/megatron.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.own_checks import own_problems

__all__ = ["as_command_line", "one_parser", "parse_arguments", "read_arguments", "reason_of"]


def read_arguments(path: Path) -> list[str]:
    """Reads the words of a file that `ds-moe-ep config` has written, or one like it.

    Args:
        path: The file: arguments with white space between them; lines that begin with # are left
            out.

    Raises:
        MegatronError: It cannot be read, or there is no argument in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MegatronError(
            f"{path}: cannot be read ({error}). Name the megatron.args that `ds-moe-ep config` has "
            "written."
        ) from error
    words = [word for line in lines if not line.startswith("#") for word in line.split()]
    if not words:
        raise MegatronError(f"{path}: there is no argument in it. `ds-moe-ep config` writes some.")
    return words


def parse_arguments(words: Sequence[str], *, rank: int, world_size: int) -> Namespace:
    """Parses and validates arguments as a program of Megatron-LM does when it starts.

    Call it within `megatron_stand_ins`.

    Args:
        words: The arguments.
        rank: The rank that they are for.
        world_size: How many there are.

    Returns:
        What Megatron has made of them.

    Raises:
        MegatronError: It refuses them, with its own words, or leaves out a check that they fail.
    """
    from megatron.training import arguments

    with as_command_line(words, rank, world_size) as said:
        try:
            parsed = arguments.parse_args()
            if problems := own_problems(parsed, world_size):
                raise MegatronError(" ".join(problems))
            arguments.validate_args(parsed)
        except MegatronError:
            raise
        except SystemExit as error:  # argparse's way to refuse; its last line says why
            reason = said.getvalue().strip().rpartition("\n")[2].rpartition("error: ")[2]
            raise MegatronError(f"Megatron does not know these arguments: {reason}.") from error
        except Exception as error:  # of any kind: mostly assertions
            raise MegatronError(f"Megatron refuses these arguments: {reason_of(error)}") from error
    return parsed


@contextlib.contextmanager
def one_parser() -> Iterator[None]:
    """Has Megatron's `parse_args` use one parser for a while instead of making one for each call.

    The parser is Megatron's and keeps nothing of what it has parsed. To make one takes long, as the
    sources of Megatron's classes are read for its help. Call it within `megatron_stand_ins`.
    """
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    with mock.patch.object(arguments, "add_megatron_arguments", lambda given: parser):
        yield


def reason_of(error: BaseException) -> str:
    """Returns on one line what an error of Megatron's or torch's says, without any traceback."""
    failures = getattr(error, "failures", None)  # of ranks, in torch's distributed checkpoint
    if failures:
        error = min(failures.items())[1][0]
    if text := " ".join(str(error).split()):
        return text
    frames = traceback.extract_tb(error.__traceback__)  # of an assertion without words
    return frames[-1].line or type(error).__name__ if frames else type(error).__name__


@contextlib.contextmanager
def as_command_line(words: Sequence[str], rank: int, world_size: int) -> Iterator[io.StringIO]:
    """Makes words the arguments of this process for a while, and catches what is printed."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["megatron", *words]),
        mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size)),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        yield said
