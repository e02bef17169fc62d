"""The import graph of a package, read from its source: imports inside functions and under TYPE_CHECKING count."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """Which modules of the package each module imports. Names have no package in front; `__init__` is the package's.

    `from package.a import b` is an import of a/b.py where that exists, else of a.py or a/__init__.py. The values of
    cli.COMMANDS ("package.a:main") are imports of cli, which makes them when a command is called.
    """
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: Graph = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found |= {_module_of(target, files) for target in _targets(node, package.name)}
        graph[module] = found - {module}
    return graph


def module_name(path: Path, package: Path) -> str:
    """`data.prepare` for data/prepare.py, `data` for data/__init__.py, `__init__` for the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports are not read here"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "COMMANDS" for t in node.targets):
        strings = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        names = [text.partition(":")[0] for text in strings if text.startswith(f"{package}.")]
    else:
        return
    yield from (name for name in names if name == package or name.startswith(f"{package}."))


def _module_of(target: str, files: dict[str, Path]) -> str:
    """The longest prefix of a dotted name that is a module; the rest are names inside it."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in files:
        parts.pop()
    return ".".join(parts) or "__init__"


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for imported in sorted(graph[module]):
            if imported not in index:
                visit(imported)
                low[module] = min(low[module], low[imported])
            elif imported in stack:
                low[module] = min(low[module], index[imported])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return sorted(found)


def read_floors(text: str) -> dict[str, int]:
    """Floors by package or module from a Markdown table `| floor | packages and modules | ... |`.

    `| 2 | loss, `options/` | ... |` gives {"loss": 2, "options": 2}. A longer name (`model/patches`) is a floor of its
    own within its package's.
    """
    rows = re.findall(r"^\|\s*(\d+)\s*\|([^|]*)\|", text, re.MULTILINE)
    floors: dict[str, int] = {}
    for number, names in rows:
        for name in re.findall(r"[\w./]+", names):
            key = name.removesuffix("/").removesuffix(".py").replace("/", ".")
            assert key not in floors, f"{name} stands on two floors"
            floors[key] = int(number)
    return floors


def floor_of(module: str, floors: dict[str, int]) -> int | None:
    """By the longest name of the table that the module is or lies in. A package's `__init__` lies in it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        floor = floors.get(".".join(parts[:length]))
        if floor is not None:
            return floor
    return None


def upward_imports(graph: Graph, floors: dict[str, int]) -> list[str]:
    """Imports of a module on a higher floor, as `a imports b (2 -> 5)`. Modules without a floor are left out."""
    found = []
    for module, imported in sorted(graph.items()):
        own = floor_of(module, floors)
        for other in sorted(imported):
            above = floor_of(other, floors)
            if own is not None and above is not None and above > own:
                found.append(f"{module} imports {other} ({own} -> {above})")
    return found


def without_floor(graph: Graph, floors: dict[str, int]) -> list[str]:
    return sorted(module for module in graph if floor_of(module, floors) is None)


def top_level(package: Path) -> list[str]:
    """Modules beside `__init__.py`, which is one of them."""
    return sorted(path.stem for path in package.glob("*.py"))
