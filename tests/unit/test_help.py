"""What commands say of their options: something of each, and the same of the same one."""

import argparse
from collections.abc import Iterator

import pytest

from ds_moe_ep import cli
from ds_moe_ep.bench import command as bench
from ds_moe_ep.engine import options

_PARSERS = {
    "ds-moe-ep": cli._parser(),
    "infer.py": options._parser("infer.py"),
    "bench.py": bench._parser(),
}
_MODEL = "Hugging Face model directory, or an expert-sharded checkpoint of `ds-moe-ep convert --to"


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yields each option of a command, its subcommands' too, and what is said of it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
        elif action.help != argparse.SUPPRESS:
            yield f"{parser.prog} {action.dest}", action.help or ""


@pytest.mark.parametrize("name", _PARSERS)
def test_something_is_said_of_every_option(name):
    said = dict(_options(_PARSERS[name]))
    assert len(said) > 10
    assert [option for option, text in said.items() if not text] == []


def _help(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_preflight_says_of_options_what_infer_does(capsys):
    told = _help(capsys, "preflight")
    assert f"--model M {_MODEL}" in told
    for text in (
        "--ep N, --ep-size N ranks that share the experts (default: --config's, else all)",
        "--task {generate,score} write completions (default) or log probabilities of the prompts",
        "--max-new-tokens N tokens of a completion at most (default: 64)",
        "--input FILE prompts: JSONL, or plain text with one a line (default: made-up ones)",
        "--metrics DIR folder for what is found: survey.jsonl and bringup.jsonl",
        "--start-timeout S seconds for all ranks to come up, and to load (default: 1800)",
    ):
        assert text in told


def test_a_model_may_be_a_checkpoint_of_ours(capsys):
    said = dict(_options(_PARSERS["infer.py"]))
    assert said["infer.py model"].startswith(_MODEL)
    for command in ("plan", "config"):
        told = _help(capsys, command)
        assert "checkpoint of `ds-moe-ep convert --to ep`, or bare config.json" in told
