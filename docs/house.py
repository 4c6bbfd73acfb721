"""Counts of the package: rooms, import floors, arguments, lines. Run `python docs/house.py`."""

import ast
import inspect
from pathlib import Path

import pellm_lightning

PACKAGE = Path(pellm_lightning.__file__).parent
MODULES = {
    ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """The folder at top level that a module is in, or the module itself."""
    return module.partition(".")[0]


def imported_rooms() -> dict[str, set[str]]:
    """For each room the other rooms that its modules import."""
    found: dict[str, set[str]] = {room(module): set() for module in MODULES if module}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                module
                and isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("pellm_lightning.")
            ):
                found[room(module)].add(room(str(node.module).partition(".")[2]))
    return {name: others - {name} for name, others in found.items()}


def floors(rooms: dict[str, set[str]]) -> list[set[str]]:
    """The rooms floor by floor, from the ground up; each imports from lower floors only."""
    built: list[set[str]] = []
    while left := rooms.keys() - set().union(*built):
        ready = {name for name in left if not rooms[name] & left}
        if not ready:
            raise SystemExit(f"These rooms import one another: {', '.join(sorted(left))}.")
        built.append(ready)
    return built


def main() -> None:
    """Print the counts."""
    rooms = imported_rooms()
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    longest = max(lines, key=lambda name: lines[name])
    arguments = inspect.signature(pellm_lightning.FederatedAveraging).parameters
    print(f"modules at top level        {len(list(PACKAGE.glob('*.py')))}")
    print(f"rooms                       {sum((PACKAGE / name).is_dir() for name in rooms)}")
    print(f"arrows between rooms        {sum(len(others) for others in rooms.values())}")
    print(f"arguments of the callback   {len(arguments)}")
    print(f"longest file                {lines[longest]} lines, {longest}")
    print(f"lines of the package        {sum(lines.values())} in {len(MODULES)} files")
    print("import floors, from the ground up")
    for number, names in enumerate(floors(rooms)):
        print(f"  {number}  {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
