"""The import graph of the project: `python -m tests.support.house` prints its rooms and the arrows between them.

Every import counts, those inside functions as well. A name taken from a package's `__init__` is an arrow to that file.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("dinojax", "converters", "experiments", "benchmarks")

Graph = Mapping[str, set[str]]


def python_files() -> dict[str, Path]:
    """The files of the project by dotted module name."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {_module(path): path for path in files}


def import_graph() -> dict[str, set[str]]:
    """Module → the modules of the project that it imports, anywhere in its code."""
    files = python_files()
    return {module: set(_imported(path, module, files)) - {module} for module, path in files.items()}


def rooms_of(graph: Graph) -> dict[str, set[str]]:
    """The same between rooms."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, imported in graph.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    return dict(rooms)


def room(module: str) -> str:
    """The folder that a module lies in; the files beside `dinojax`'s rooms are rooms of their own."""
    path = python_files()[module].relative_to(ROOT)
    return path.as_posix() if path.parent.as_posix() == "dinojax" else path.parent.as_posix()


def circle(graph: Graph) -> list[str]:
    """A circle of imports, first module twice; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def floors(graph: Graph) -> list[list[str]]:
    """Rooms from the ground up: each stands on those below it."""
    sorter, found = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, module: str, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports are not used here"
            for alias in node.names:  # a module of the package, or a name in it
                name = f"{node.module}.{alias.name}"
                yield from (found for found in [name if name in files else node.module] if found in files)


def main() -> None:
    """Prints floors, rooms with their sizes, and arrows."""
    files, graph = python_files(), import_graph()
    rooms, lines = rooms_of(graph), defaultdict(int)
    for module, path in files.items():
        lines[room(module)] += len(path.read_text().splitlines())
    for number, floor in reversed(list(enumerate(floors(rooms), 1))):
        for name in floor:
            below = ", ".join(sorted(rooms[name])) or "nothing of ours"
            print(f"floor {number}  {name} ({lines[name]:,} lines) → {below}")
    print(f"{len(rooms)} rooms, {sum(map(len, rooms.values()))} arrows, {len(files)} files, "
          f"{sum(lines.values()):,} lines; circle: {' → '.join(circle(graph)) or 'none'}")  # fmt: skip


if __name__ == "__main__":
    main()
