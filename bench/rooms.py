"""List the imports between the files of this repository's packages, and the circles among them.

``python bench/rooms.py`` prints the folders of both packages with their lines of code and the folders that they import,
and every circle and upward import. ``tests/test_rooms.py`` fails if there is one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path

import networkx  # comes with torch

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "",
    "data",
    "mini",
    "towers",
    "model",
    "training",
    "eval",
    "pretrain",
    "chat",
    "tune",
    "qa",
    "live",
    "serve",
    "page",
    "vllm",
    "lmms_eval",
    "commands",
)
"""Folders of ``bt_adapter``; "" holds its top-level files. A folder imports only from folders before it."""
FACADES = {"bt_adapter", "bt_adapter.native", "bt_kernels", "bt_kernels.nn"}
"""Modules that name what is public: they import from anywhere."""


def find_modules(package: str) -> dict[str, Path]:
    """Map the dotted names of a package's modules to their files."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Map each module to those it imports, within functions and for type checking too."""
    return {name: set(_imports_of(name, path, modules)) - {name} for name, path in modules.items()}


def _imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                member = f"{source}.{alias.name}"
                if member in modules or source in modules:
                    yield member if member in modules else source


def find_circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Find the sets of nodes that reach one another (strongly connected components of two or more nodes)."""
    directed = networkx.DiGraph({node: list(others) for node, others in graph.items()})
    return sorted(sorted(part) for part in networkx.strongly_connected_components(directed) if len(part) > 1)


def folders_of(imports: Mapping[str, Iterable[str]], modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Map each folder to the folders that its files import from; public facades are left out."""
    graph: dict[str, set[str]] = {}
    for name, others in imports.items():
        here = str(modules[name].parent.relative_to(ROOT))
        graph.setdefault(here, set())
        if name not in FACADES:
            graph[here] |= {str(modules[other].parent.relative_to(ROOT)) for other in others} - {here}
    return graph


def room_of(path: Path) -> str:
    """Return the folder of ``bt_adapter`` that a file stands in, "" for a top-level file."""
    parts = path.relative_to(ROOT / "bt_adapter").parts
    return parts[0] if len(parts) > 1 else ""


def find_upward(imports: Mapping[str, Iterable[str]], modules: Mapping[str, Path]) -> list[tuple[str, str]]:
    """List the imports, (importer, imported), of modules whose folder stands after the importer's in `ROOMS`."""
    return [
        (name, other)
        for name, others in imports.items()
        if name not in FACADES
        for other in sorted(others)
        if ROOMS.index(room_of(modules[other])) > ROOMS.index(room_of(modules[name]))
    ]


def main() -> None:
    """Print what the module's docstring says."""
    for package in ("bt_adapter", "bt_kernels"):
        modules = find_modules(package)
        imports = read_imports(modules)
        folders = folders_of(imports, modules)
        lines: dict[str, int] = {}
        for path in modules.values():
            folder = str(path.parent.relative_to(ROOT))
            lines[folder] = lines.get(folder, 0) + path.read_text(encoding="utf-8").count("\n")
        for folder, count in lines.items():
            print(f"{folder:28} {count:6} lines, imports {', '.join(sorted(folders[folder])) or 'none'}")
        print(f"{package:28} {sum(lines.values()):6} lines")
        for kind, graph in (("files", {k: v for k, v in imports.items() if k not in FACADES}), ("folders", folders)):
            for circle in find_circles(graph):
                print(f"circle of {kind}: {', '.join(circle)}")
        for name, other in find_upward(imports, modules) if package == "bt_adapter" else ():
            print(f"upward: {name} imports {other}")


if __name__ == "__main__":
    main()
