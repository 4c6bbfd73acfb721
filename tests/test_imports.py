"""Imports run one way; Lightning, c10d and pickle stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pellm_lightning

PACKAGE = Path(pellm_lightning.__file__).parent

LEAVES = {"topology", "parameters", "layout", "schedule", "durable", "optim", "naming", "digest"}
LEAVES |= {"adapter_config", "pickling", "portable"}
ABOVE_LEAVES = {"frozen_state", "base_difference"}
PASSPORT = {"passport"}
PRIVACY = {"privacy"}
FEDERATION = {"federation"}
EXCHANGE = {"exchange"}
AGGREGATION = {"aggregation"}
BELOW_ROUND = {"meeting", "outer", "products", "beside", "adapters"}
PARTS_OF_ROUND = {"updates", "who_counts"}
GLOBAL_STATE = {"global_state"}
REPLICA = {"replica"}
ROUND = {"round"}
OVER_ROUND = {"overlap"}
FRAGMENTS = {"fragments"}
LIGHTNING_SIDE = {"environment", "checks", "fit_facts", "isolation", "resume", "samples", "validation"}
LIGHTNING_SIDE |= {"saved_config", "trainable", "weight_averaging"}
ABOVE = ["participation", "callback", "tasks", "doctor", "commands", "cli", "results", "__main__"]
ORDER = [
    LEAVES,
    ABOVE_LEAVES,
    PASSPORT,
    PRIVACY,
    FEDERATION,
    EXCHANGE,
    AGGREGATION,
    BELOW_ROUND,
    PARTS_OF_ROUND,
    GLOBAL_STATE,
]
ORDER += [REPLICA, ROUND, OVER_ROUND, FRAGMENTS, LIGHTNING_SIDE, {"drift"}, {"report"}]
ORDER += [{name} for name in ABOVE]
MAY_IMPORT_LIGHTNING = LIGHTNING_SIDE | set(ABOVE) | {"drift", "privacy.record_level"}
MAY_IMPORT_LIGHTNING |= {"report.bar", "report.lines", "report.teller"}
MAY_IMPORT_C10D = {"federation", "environment"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below the package, '' for the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported: ``from a import b`` gives a.b, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not told apart here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> Iterator[str]:
    """The package's modules that are imported, by their dotted name below the package."""
    for name in imported(tree):
        first, _, rest = name.partition(".")
        if first == "pellm_lightning":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield rest


def place(module: str) -> int:
    """How far up in the house a module stands."""
    return next(index for index, names in enumerate(ORDER) if module.partition(".")[0] in names)


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
        same_house = name.partition(".")[0] == other.partition(".")[0]
        assert place(other) <= place(name), f"{name} must not import {other}"
        if place(name) == place("topology"):
            pytest.fail(f"{name} is a leaf and imports {other}")
        if place(other) == place(name) and name not in LIGHTNING_SIDE:
            assert same_house, f"{name} must not import {other}"


def test_imports_have_no_cycle() -> None:
    graph = {name: set(own_imports(tree)) - {name} for name, tree in MODULES.items() if name}
    left = dict(graph)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    # A package's __init__ gathers its modules, which may in turn name the package.
    assert not {name for name in left if name not in ("federation", "tasks")}, f"cycle among {sorted(left)}"


def test_every_module_has_its_place() -> None:
    for name in MODULES:
        if name:
            place(name)
    assert len(MODULES) > 15, "the package was not found"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_lightning_stays_where_it_belongs(name: str) -> None:
    if not {name, name.partition(".")[0]} & MAY_IMPORT_LIGHTNING:
        assert not names_lightning(MODULES[name])


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_c10d_stays_where_it_belongs(name: str) -> None:
    if name.partition(".")[0] not in MAY_IMPORT_C10D:
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
    assert makers == ["federation.launch.gloo"]


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_nothing_is_pickled(name: str) -> None:
    # A party's processes trust each other: Lightning's own ``strategy.broadcast`` inside a party is allowed.
    assert not pickles(MODULES[name])


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
from pellm_lightning.engine import compatibility as passport
from pellm_lightning.comm.errors import MismatchError
from pellm_lightning import FederatedAveraging
if True:
    def f():
        from pellm_lightning.engine.aggregator import Aggregator
"""
    assert list(own_imports(ast.parse(source))) == ["passport", "federation.errors", "", "round"]
