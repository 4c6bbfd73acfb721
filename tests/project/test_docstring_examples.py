"""Every public class has an example in its docstring, and the examples of the package run."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pellm_lightning


def modules() -> Iterator[ModuleType]:
    """The package and all its modules."""
    yield pellm_lightning
    for module in pkgutil.walk_packages(pellm_lightning.__path__, "pellm_lightning."):
        if not module.name.endswith("__main__"):
            yield importlib.import_module(module.name)


MODULES = {module.__name__: module for module in modules()}
EXAMPLES = {
    test.name: test
    for module in MODULES.values()
    for test in doctest.DocTestFinder().find(module)
    if test.examples
}
PUBLIC = {
    f"{value.__module__}.{value.__qualname__}": value
    for module in MODULES.values()
    for value in (getattr(module, name) for name in getattr(module, "__all__", ()))
    if inspect.isclass(value) and not issubclass(value, Exception)
}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(EXAMPLES[name], out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_class_has_an_example(name: str) -> None:
    assert name in EXAMPLES, f"{name}: give its docstring an example"
