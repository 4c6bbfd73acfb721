"""What the package's modules import, read from their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pellm_lightning

PACKAGE = Path(pellm_lightning.__file__).parent


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
        if first == "pellm_lightning" and rest != "__version__":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield rest
