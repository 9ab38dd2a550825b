"""Without megatron-core there is one line that says how to install it; stand-ins leave no trace."""

import sys
import typing

import pytest
import torch

from ds_moe_ep.cli import main
from ds_moe_ep.megatron import stand_ins
from tests.helpers.launch import REPO
from tests.helpers.megatron import REQUIRE_MEGATRON, require_megatron

Skipped, Failed = pytest.skip.Exception, pytest.fail.Exception


def test_without_megatron_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(stand_ins, "_has", lambda module: False)
    file = REPO / "configs" / "olmoe-1b-7b-ep64" / "megatron.args"
    assert main(["megatron", "check", "--args", str(file), "--world", "64"]) == 2
    assert capsys.readouterr().err == (
        "MegatronError: megatron-core 0.17 or newer is not installed. To have it, with Python 3.11 "
        "or newer: pip install --no-deps --ignore-requires-python megatron-core==0.19.2\n"
    )


@pytest.mark.parametrize(("promised", "outcome"), [("", Skipped), ("1", Failed)])
def test_tests_without_megatron_are_skipped_unless_it_was_promised(promised, outcome, monkeypatch):
    monkeypatch.setattr(stand_ins, "_has", lambda module: False)
    monkeypatch.setenv(REQUIRE_MEGATRON, promised)
    with pytest.raises(outcome, match="megatron-core 0.17 or newer is not installed"):
        require_megatron()


def test_ci_promises_megatron():
    assert f"export {REQUIRE_MEGATRON}=" in (REPO / ".ci" / "run").read_text()


def test_with_a_gpu_nothing_of_cuda_is_replaced(monkeypatch):
    # Which functions of megatron-core and torch.cuda there are does not matter if none is replaced.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stand_ins, "import_megatron", lambda: None)
    monkeypatch.setattr(stand_ins, "_own_of_megatron", lambda: ())
    before = dict(vars(torch.cuda))
    with stand_ins.megatron_stand_ins():
        assert dict(vars(torch.cuda)) == before
    with stand_ins.megatron_stand_ins("meta"):
        assert torch.cuda.current_device() == "meta"
    assert dict(vars(torch.cuda)) == before


def test_the_line_names_the_version_that_tests_install():
    script = (REPO / "launch" / "setup.sh").read_text()
    assert f'MEGATRON="{stand_ins.INSTALL.split()[-1]}"' in script
    assert stand_ins.INSTALL.rpartition(" ")[0].removeprefix("pip install ") in script


@pytest.mark.parametrize("fails", [False, True])
def test_what_stood_in_is_gone_afterwards(fails, monkeypatch):
    seen = {}

    def import_module(name):
        seen["triton"] = "triton" in sys.modules
        seen["override"] = hasattr(typing, "override")
        seen["compiled"] = torch.compile(len) is not len
        if fails:
            raise ImportError("no")

    monkeypatch.setattr(stand_ins, "_has", lambda module: module != "triton")
    monkeypatch.setattr(stand_ins, "_ENTRY_POINTS", ("megatron.core",))
    monkeypatch.setattr(stand_ins.importlib, "import_module", import_module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(typing, "override", lambda method: method, raising=False)
    compile_before, had_triton = torch.compile, "triton" in sys.modules
    if fails:
        with pytest.raises(stand_ins.MegatronError, match=r"does not import \(no\)"):
            stand_ins.import_megatron()
    else:
        stand_ins.import_megatron()
    assert seen == {"triton": True, "override": True, "compiled": False}
    assert torch.compile is compile_before
    assert ("triton" in sys.modules) == had_triton
