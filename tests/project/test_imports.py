"""Imports run one way; Lightning, c10d and pickle stay where they belong."""

import ast
import re
import runpy

import pytest
from package_imports import MODULES, PACKAGE, imported, own_imports
from paths import ROOT

# The floors of the house, from the ground up: a room imports from its own and from lower floors only.
FLOORS = [
    {"comm", "privacy", "tensors"},
    {"aggregation", "exchange", "trainer"},
    {"engine"},
    {"loop", "report"},
    {"callbacks", "integrations"},
    {"tasks"},
    {"cli"},
    {"__main__"},
]
WITHOUT_LIGHTNING = {"tensors", "comm", "privacy", "exchange", "aggregation", "engine", "loop"}
MAY_IMPORT_C10D = {"comm", "trainer.environment", "trainer.party_parameters"}


def room(module: str) -> str:
    """The folder at top level, or the module there, that a module is in."""
    return module.partition(".")[0]


def floor(module: str) -> int:
    """How far up in the house a module stands."""
    return next(index for index, rooms in enumerate(FLOORS) if room(module) in rooms)


def names_c10d(tree: ast.AST) -> bool:
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {*imported(tree), *dotted}
    return any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names)


def names_lightning(tree: ast.AST) -> bool:
    return any(
        name.split(".")[0] in ("lightning", "lightning_utilities", "lightning_fabric", "pytorch_lightning")
        for name in imported(tree)
    )


def pickles(tree: ast.AST) -> list[str]:
    """What may run the code of whoever wrote the data: pickle, its kin, and all that falls back on it."""
    found = []
    for name in imported(tree):
        if name.split(".")[0] in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
            found.append(name)
        if "_object" in name:
            found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if "_object" in name:
                found.append(name)
        if isinstance(node, ast.Call):
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            if (
                called.endswith(("torch.load", "load_from_checkpoint"))
                and settings.get("weights_only") != "True"
            ):
                found.append(called)
            if settings.get("allow_pickle") == "True" or settings.get("trust_remote_code") == "True":
                found.append(called)
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_run_one_way(name: str) -> None:
    for other in own_imports(MODULES[name]):
        assert other, f"{name} imports a public name of the package; let it import the module that has it"
        assert floor(other) < floor(name) or room(other) == room(name), f"{name} must not import {other}"


def test_imports_have_no_cycle() -> None:
    graph = {name: set(own_imports(tree)) - {name} for name, tree in MODULES.items() if name}
    left = dict(graph)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    # A package's __init__ gathers its modules, which may in turn name the package.
    assert not {name for name in left if name not in ("comm", "tasks")}, f"cycle among {sorted(left)}"


def test_every_module_has_its_place() -> None:
    for name in MODULES:
        if name:
            floor(name)
    assert len(MODULES) > 15, "the package was not found"


def test_the_page_shows_the_floors_that_are_measured() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert [(int(floor), set(re.findall(r"`(\w+)`", rooms))) for floor, rooms in rows[::-1]] == [
        *enumerate(FLOORS)
    ]
    house = runpy.run_path(str(ROOT / "docs/house.py"))
    assert house["floors"](house["imported_rooms"]()) == FLOORS


def test_nothing_but_rooms_at_top_level() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in WITHOUT_LIGHTNING])
def test_lightning_stays_where_it_belongs(name: str) -> None:
    assert not names_lightning(MODULES[name])


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_c10d_stays_where_it_belongs(name: str) -> None:
    if not {name, name.rpartition(".")[0], room(name)} & MAY_IMPORT_C10D:
        assert not names_c10d(MODULES[name])


def test_process_groups_are_made_in_one_module() -> None:
    # So that a transcript taken there holds all that crosses between parties.
    makers = [
        name
        for name, tree in MODULES.items()
        if any(
            isinstance(node, ast.Attribute) and node.attr.startswith("ProcessGroup")
            for node in ast.walk(tree)
        )
    ]
    assert makers == ["comm.torchrun.gloo"]


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_nothing_is_pickled(name: str) -> None:
    # A party's processes trust each other: they belong to one institution.
    assert pickles(MODULES[name]) == (["broadcast_object_list"] if name == "comm.party" else [])


# ---- the finders themselves


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "M.load_from_checkpoint('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_pickling_is_found(source: str) -> None:
    assert pickles(ast.parse(source))


def test_safe_loading_is_no_pickling() -> None:
    assert not pickles(ast.parse("import torch, json\ntorch.load('x', weights_only=True)\njson.loads('1')"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import Store",
        "from torch.distributed.tensor import DTensor",
        "def f():\n    import torch.distributed.tensor",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_c10d_is_found(source: str) -> None:
    assert names_c10d(ast.parse(source))
    assert not names_c10d(
        ast.parse("import torch\ntorch.zeros(1)\nfrom torch.utils.data import DistributedSampler")
    )


def test_own_imports_are_found() -> None:
    source = """
from pellm_lightning.tensors import digest
from pellm_lightning.comm.errors import MismatchError
from pellm_lightning import FederatedAveraging
if True:
    def f():
        from pellm_lightning.engine.aggregator import Aggregator
"""
    assert list(own_imports(ast.parse(source))) == ["tensors.digest", "comm.errors", "", "engine.aggregator"]
