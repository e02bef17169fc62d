"""How tests reach what they share: by imports of modules that are not tests, never through sys.path."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def changes_of_the_path(tree: ast.AST) -> list[int]:
    """Lines that touch `sys.path`, by whatever method, or `site.addsitedir`, or import the name."""
    found = []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if attribute and (node.value.id, node.attr) in (("sys", "path"), ("site", "addsitedir")):
            found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in {a.name for a in node.names}:
            found.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr == "syspath_prepend":
            found.append(node.lineno)
    return found


def imports_of_tests(tree: ast.AST) -> list[str]:
    """Imported test modules and conftests."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [
        name
        for name in names
        if name.split(".")[0] in ("tests", "conftest") or name.startswith("test_")
        if any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    ]


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text("utf-8"))


def test_no_test_edits_sys_path():
    found = {str(path.relative_to(TESTS)): lines for path in FILES if (lines := changes_of_the_path(parsed(path)))}
    assert found.keys() == {"torchvision_ops.py"}  # a package that the tests alone may see


def test_no_test_imports_a_test():
    assert {str(path.relative_to(TESTS)): names for path in FILES if (names := imports_of_tests(parsed(path)))} == {}


def test_every_folder_of_tests_is_a_package():
    """Otherwise pytest puts the folder itself on sys.path, and two tests of one name collide."""
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file()) == []


@pytest.mark.parametrize(
    "line",
    ["import sys; sys.path.insert(0, 'x')", "from sys import path", "sys.path += ['x']", "m.syspath_prepend('x')"],
)
def test_a_change_of_the_path_is_seen(line):
    assert changes_of_the_path(ast.parse(line)) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "from tests.test_trainer import config",
        "import tests.data.test_rows",
        "from tests import conftest",
        "from test_a import b",
    ],
)
def test_an_import_of_a_test_is_seen(line):
    assert len(imports_of_tests(ast.parse(line))) == 1


def test_imports_of_helpers_are_allowed():
    assert imports_of_tests(ast.parse("from tests.trainer_runs import config\nfrom json import test_x")) == []
