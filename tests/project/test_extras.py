"""What is installed by default is enough to import the package; what needs more says which extra has it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from lightning.pytorch import cli as lightning_cli
from package_imports import MODULES, PACKAGE, own_imports
from packaging.requirements import Requirement
from packaging.version import Version

from pellm_lightning import FederatedCLI
from pellm_lightning.cli import commands
from pellm_lightning.cli.main import MODULES as COMMANDS
from pellm_lightning.tasks.partition import plot_labels
from pellm_lightning.tasks.pretrained import load_model, load_tokenizer

# Lightning and torch cannot be without those of the second line.
CORE = {"lightning", "torch", "peft", "transformers", "numpy"}
CORE |= {
    "lightning_utilities",
    "safetensors",
    "torchmetrics",
    "typing_extensions",
    "jinja2",
}  # what these need
# They need an extra, so who uses them imports them at the last moment.
OPTIONAL = {"comm.keys", "comm.rendezvous.etcd", "comm.revocation", "comm.signing_keys"}
OPTIONAL |= {f"exchange.secure.{name}" for name in ("collectives", "fixed_point", "key_agreement")}
OPTIONAL |= {f"report.{name}" for name in ("bar", "chart", "figures", "page", "view")}


def at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are made when the module is: not those of functions or for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(node)


def others(tree: ast.AST) -> set[str]:
    """The packages of others that are imported when the module is."""
    found = set()
    for node in at_import(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {PACKAGE.name}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OPTIONAL])
def test_the_core_is_enough_to_import(name: str) -> None:
    assert not others(MODULES[name]) - CORE
    for node in at_import(MODULES[name]):
        module = ast.Module([node], [])
        assert not OPTIONAL & set(own_imports(module)), f"{name} imports at once what needs an extra"


def test_the_package_imports_without_what_the_extras_bring() -> None:
    """Lightning asks metadata what is there, and its own modules hold less without."""
    code = """
import sys
from lightning_utilities.core.imports import RequirementCache

away = ["jsonargparse", "rich", "gguf", "datasets", "matplotlib", "tensorboard"]
away += ["cryptography", "etcd3gw", "dp_accounting", "opacus"]
there = RequirementCache.__bool__
RequirementCache.__bool__ = lambda self: not any(n in str(self.requirement) for n in away) and there(self)
sys.modules.update(dict.fromkeys(away))
import pellm_lightning
from pellm_lightning import exchange, privacy, tasks
from pellm_lightning.cli import doctor
from pellm_lightning.callbacks import drift
print([name for name in pellm_lightning.__all__ if not hasattr(pellm_lightning, name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_what_needs_an_extra_is_listed_for_a_reason() -> None:
    for name in OPTIONAL:
        ours = {other for node in at_import(MODULES[name]) for other in own_imports(ast.Module([node], []))}
        assert others(MODULES[name]) - CORE or ours & OPTIONAL


def test_imports_that_wait_are_told_apart() -> None:
    source = """
import os, numpy
from scipy.linalg import svd
if TYPE_CHECKING:
    import matplotlib
class A:
    import yaml
    def f(self):
        import gguf
try:
    import rich
except ImportError:
    pass
"""
    assert others(ast.parse(source)) == {"numpy", "scipy", "yaml", "rich"}


# ---- each without its extra; those of certificates, etcd, masks and privacy are told by their own tests


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name] == "commands"])
def test_commands_name_their_extra(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pellm-lightning[cli]'")):
        commands.main([command])


def test_the_command_line_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_cli, "_JSONARGPARSE_SIGNATURES_AVAILABLE", False)
    with pytest.raises(ImportError, match=re.escape("pip install 'pellm-lightning[cli]'")):
        FederatedCLI(args=["fit"])


def test_plots_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pellm-lightning[plots]'")):
        plot_labels(["x", "y"], [[0], [1]])


def test_gguf_files_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellm_lightning.tasks.pretrained.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pellm-lightning[tasks]'")):
        load_model(None, "folder/model.gguf")
    with pytest.raises(ImportError, match=re.escape("'folder/model.gguf' needs the package gguf")):
        load_tokenizer("folder/model.gguf")


# ---- what `make oldest` installs


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """Those of what users install; what only tests, documents and developers need has none to keep."""
    pins = [Requirement(line) for line in lines(PACKAGE.parent / "constraints-oldest.txt")]
    pinned = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    bounds = {}
    for wanted in map(Requirement, requires("pellm-lightning") or []):
        of_extra = str(wanted.marker or "").partition("extra == ")[2].strip("'\"")
        lowest = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
        if lowest and of_extra not in ("test", "docs", "dev"):
            bounds[wanted.name] = lowest[0]
    assert pinned == bounds


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
