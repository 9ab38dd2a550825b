"""The house rules a linter does not know: layers, imports without effects, ASCII, `__all__`.

Each rule is a function from a module's source to the lines that break it, tried on made-up
sources first, so that a rule that finds nothing is known to look.
"""

import ast
import graphlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

_SOURCES = sorted(
    path for folder in ("ds_moe_ep", "launch") for path in (REPO / folder).rglob("*.py")
)

# Modules at the top of the package are layer 1; a new folder must be given a layer here.
_LAYER_1 = 1
_LAYER_OF_FOLDER = {
    "config": 2,
    "dist": 3,
    "moe": 3,
    "predict": 3,
    "adapter": 4,
    "checkpoint": 4,
    "bringup": 5,
    "engine": 5,
    "infer_job": 5,
    "monitor": 5,
    "bench": 5,
    "demo": 5,
    "megatron": 5,
    "rehearsal": 5,
    "cli": 6,
    "cli_balance": 6,
    "cli_convert": 6,
    "cli_megatron": 6,
    "cli_predict": 6,
    "cli_preflight": 6,
    "cli_rehearse": 6,
    "cli_report": 6,
    "cli_upcycle": 6,
    "plan_report": 6,
    "__main__": 6,
}
_TOP_LAYER = 6

# What a layer adds to the libraries that its modules may import.
_LIBRARIES_OF_LAYER = {
    1: set(),
    2: {"pydantic", "pydantic_core", "yaml"},
    3: {"torch", "deepspeed"},
    4: {"transformers", "accelerate", "safetensors", "tokenizers"},
    5: {"matplotlib", "megatron", "numpy", "prometheus_client", "psutil", "rich", "tqdm", "wandb"},
    6: set(),
}

# Reading the environment, opening files and starting process groups, by the last name called.
_EFFECTS = {
    "environ",
    "getenv",
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "init_process_group",
    "init_distributed",
    "new_group",
}

_Rule = Callable[[str, ast.Module], Iterator[str]]


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def _layer(module: str) -> int:
    package, *rest = module.split(".")
    if package == "launch":
        return _TOP_LAYER
    if rest and rest[0] in _LAYER_OF_FOLDER:
        return _LAYER_OF_FOLDER[rest[0]]
    assert len(rest) < 2, f"{module}: give the folder {rest[0]} a layer in {Path(__file__).name}"
    return _LAYER_1


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full"
            if node.module == "ds_moe_ep":  # the names may be modules
                yield from ((node.lineno, f"ds_moe_ep.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def imports_from_a_higher_layer(module: str, tree: ast.Module) -> Iterator[str]:
    for line, name in _imports(tree):
        if name.split(".")[0] in ("ds_moe_ep", "launch") and _layer(name) > _layer(module):
            yield f"{line}: layer {_layer(module)} imports {name} of layer {_layer(name)}"


def imports_a_library_of_a_higher_layer(module: str, tree: ast.Module) -> Iterator[str]:
    own = {"ds_moe_ep", "launch"}
    allowed = set().union(*(_LIBRARIES_OF_LAYER[n] for n in range(1, _layer(module) + 1)))
    for line, name in _imports(tree):
        library = name.split(".")[0]
        if library not in sys.stdlib_module_names | own | allowed:
            yield f"{line}: layer {_layer(module)} imports {library}"


def imports_megatron_outside_of_its_folder(module: str, tree: ast.Module) -> Iterator[str]:
    if not f"{module}.".startswith("ds_moe_ep.megatron."):
        for line, name in _imports(tree):
            if name.split(".")[0] == "megatron":
                yield f"{line}: imports {name}"


def has_effects_on_import(module: str, tree: ast.Module) -> Iterator[str]:
    for node in _run_on_import(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        if name in _EFFECTS:
            yield f"{node.lineno}: {name} when imported"


def _run_on_import(node: ast.AST) -> Iterator[ast.expr]:
    """Yields the expressions an import evaluates: all but function bodies and the main guard."""
    if isinstance(node, ast.expr):
        yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return
    if isinstance(node, ast.Lambda):
        return
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _run_on_import(child)


def says_not_what_is_public(module: str, tree: ast.Module) -> Iterator[str]:
    if module.split(".")[-1].startswith("_") or module.startswith("launch"):
        return
    if len(tree.body) == 1:  # a docstring
        return
    targets = [
        target
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    if "__all__" not in map(ast.unparse, targets):
        yield "1: no __all__"


_RULES: list[_Rule] = [
    imports_from_a_higher_layer,
    imports_a_library_of_a_higher_layer,
    imports_megatron_outside_of_its_folder,
    has_effects_on_import,
    says_not_what_is_public,
]


@pytest.mark.parametrize("rule", _RULES, ids=lambda rule: rule.__name__)
def test_no_module(rule):
    assert len(_SOURCES) > 10
    broken = [
        f"{path.relative_to(REPO)}:{problem}"
        for path in _SOURCES
        for problem in rule(_module_name(path), ast.parse(path.read_text()))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "module", "source", "expected"),
    [
        (
            imports_from_a_higher_layer,
            "ds_moe_ep.plan",
            "from ds_moe_ep import hostfile\ndef f():\n    from ds_moe_ep.config.run import x\n",
            ["3: layer 1 imports ds_moe_ep.config.run of layer 2"],
        ),
        (
            imports_from_a_higher_layer,
            "ds_moe_ep.dist.groups",
            "from ds_moe_ep import plan, engine\nimport ds_moe_ep.moe.layer\nimport launch.infer\n",
            [
                "1: layer 3 imports ds_moe_ep.engine of layer 5",
                "3: layer 3 imports launch.infer of layer 6",
            ],
        ),
        (
            imports_a_library_of_a_higher_layer,
            "ds_moe_ep.config.run",
            "import yaml, json\nif x:\n    import torch.nn as nn\nfrom ds_moe_ep import plan\n",
            ["3: layer 2 imports torch"],
        ),
        (
            imports_megatron_outside_of_its_folder,
            "ds_moe_ep.config.megatron",
            "from ds_moe_ep.megatron import check\ndef f():\n    import megatron.core\n"
            "    from megatron import training\n",
            ["3: imports megatron.core", "4: imports megatron"],
        ),
        (
            imports_megatron_outside_of_its_folder,
            "ds_moe_ep.megatron.check",
            "from megatron.training import arguments\n",
            [],
        ),
        (
            has_effects_on_import,
            "ds_moe_ep.plan",
            "import os\nX = os.environ['X']\ndef f(x=open('f')):\n    return os.getenv('y')\n"
            "class C:\n    y = [p.read_text() for p in z]\ng = lambda: open('f')\n"
            "if __name__ == '__main__':\n    open('f')\n",
            [
                "2: environ when imported",
                "3: open when imported",
                "6: read_text when imported",
            ],
        ),
        (says_not_what_is_public, "ds_moe_ep.plan", "'doc'\nx = 1\n", ["1: no __all__"]),
        (says_not_what_is_public, "ds_moe_ep.plan", "'doc'\n__all__ = ['x']\nx = 1\n", []),
        (says_not_what_is_public, "ds_moe_ep._plan", "'doc'\nx = 1\n", []),
    ],
)
def test_a_rule_finds_what_it_is_for(rule, module, source, expected):
    assert list(rule(module, ast.parse(source))) == expected


def test_a_folder_without_a_layer_is_found():
    with pytest.raises(AssertionError, match="give the folder misc a layer"):
        _layer("ds_moe_ep.misc.helpers")


def _circle(sources: Mapping[str, str]) -> list[str]:
    """Returns folders of the package that import each other in a circle; none if there are none."""
    imported: dict[str, set[str]] = {}
    for module, source in sources.items():
        package, folder, *rest = [*module.split("."), ""]
        if package == "ds_moe_ep" and rest:  # a module at the top has a layer of its own
            names = [name.split(".") for _, name in _imports(ast.parse(source))]
            others = {name[1] for name in names if name[0] == package and len(name) > 2}
            imported.setdefault(folder, set()).update(others - {folder})
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_folders_do_not_import_each_other_in_a_circle():
    assert not _circle({_module_name(path): path.read_text() for path in _SOURCES})


def test_a_circle_is_found():
    sources = {
        "ds_moe_ep.a.x": "from ds_moe_ep.b.y import f\n",
        "ds_moe_ep.b.y": "def f():\n    from ds_moe_ep.c.z import g\n",
        "ds_moe_ep.c.z": "from ds_moe_ep import plan\n",
    }
    assert not _circle(sources)
    sources["ds_moe_ep.c.z"] = "import ds_moe_ep.a.x\n"
    assert set(_circle(sources)) == {"a", "b", "c"}


def test_code_is_ascii():
    folders = ("ds_moe_ep", "launch", "tests", ".ci")
    files = [path for folder in folders for path in (REPO / folder).rglob("*")]
    code = [path for path in files if path.suffix in (".py", ".sh") or path.name == "run"]
    assert not [str(path) for path in code if not path.read_bytes().isascii()]


def test_reading_prompts_and_planning_do_not_import_torch():
    light = ["ds_moe_ep.cli", "ds_moe_ep.plan", "ds_moe_ep.placement", "ds_moe_ep.model_spec"]
    light += ["ds_moe_ep.engine.prompts", "ds_moe_ep.engine.outputs", "ds_moe_ep.engine.schedule"]
    light += ["ds_moe_ep.monitor.page", "ds_moe_ep.monitor.top"]
    program = f"import sys, {', '.join(light)}\nprint('torch' in sys.modules)"
    result = run_command([sys.executable, "-c", program])
    assert (result.stdout, result.stderr) == ("False\n", "")
