"""The import graph of the package: no circle, no import upward of the floors in CONTRIBUTING.md, a small top level."""

from pathlib import Path

import pytest

import orpo_dist
from tests.import_graph import circles, floor_of, import_graph, read_floors, top_level, upward_imports, without_floor

PACKAGE = Path(orpo_dist.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
MOST_AT_THE_TOP_LEVEL = 10


@pytest.fixture(scope="module")
def graph():
    return import_graph(PACKAGE)


@pytest.fixture(scope="module")
def floors():
    return read_floors(CONTRIBUTING.read_text("utf-8"))


def test_no_imports_form_a_circle(graph):
    assert circles(graph) == []


def test_every_module_has_a_floor(graph, floors):
    assert floors, "CONTRIBUTING.md has no table of floors"
    assert without_floor(graph, floors) == []


def test_no_floor_is_empty(graph, floors):
    """A name of the table that is no module or package any more."""
    known = {".".join(module.split(".")[:n]) for module in graph for n in range(1, module.count(".") + 2)}
    assert sorted(floors.keys() - known) == []


def test_no_import_goes_upward(graph, floors):
    assert upward_imports(graph, floors) == []


def test_few_modules_at_the_top_level():
    assert len(top_level(PACKAGE)) <= MOST_AT_THE_TOP_LEVEL


# ---------------------------------------------------------------- the checks see what they look for


@pytest.fixture
def package(tmp_path):
    """`package(**files)`: a package `house` of these modules, `a__b` for a/b.py. Returns its graph."""

    def make(**files: str):
        root = tmp_path / "house"
        root.mkdir()
        for name, text in files.items():
            path = root / (name.strip("_").replace("__", "/") + ".py" if name != "__init__" else "__init__.py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return import_graph(root)

    return make


def test_imports_in_functions_and_for_types_and_of_commands_count(package):
    graph = package(
        __init__="",
        cli='COMMANDS = {"train": ("house.train:main", "train a model"), "other": "elsewhere.x:main"}\n',
        train="def main():\n    from house.model.load import load\n",
        model__load=(
            "from typing import TYPE_CHECKING\nimport os\nfrom house import helper, __version__\n"
            "if TYPE_CHECKING:\n    import house.train\n"
        ),
        helper="from house.model import load\n",
    )
    assert graph["cli"] == {"train"}
    assert graph["train"] == {"model.load"}
    assert graph["model.load"] == {"helper", "__init__", "train"}
    assert graph["helper"] == {"model.load"}
    assert circles(graph) == [["helper", "model.load", "train"]]


def test_two_circles_that_do_not_touch(package):
    graph = package(
        a="import house.b",
        b="import house.a",
        c="import house.d\nimport house.a",
        d="import house.c",
        e="import house.d",
    )
    assert circles(graph) == [["a", "b"], ["c", "d"]]


TABLE = """
| floor | modules and packages | what |
|---|---|---|
| 1 | `errors` | the exceptions |
| 2 | `data/`, `loss.py` | rows |
| 3 | `data/late` | one module of a package on a floor of its own |
"""


def test_floors_are_read_from_a_table():
    floors = read_floors(TABLE)
    assert floors == {"errors": 1, "data": 2, "loss": 2, "data.late": 3}
    assert [floor_of(module, floors) for module in ("data", "data.rows", "data.late", "cli")] == [2, 2, 3, None]


def test_upward_imports_and_missing_floors_are_seen(package):
    graph = package(
        errors="import house.data.rows", data__rows="from house.data import late\nimport house.errors",
        data__late="import house.loss", loss="", cli="import house.data.late",
    )  # fmt: skip
    floors = read_floors(TABLE)
    assert upward_imports(graph, floors) == [
        "data.rows imports data.late (2 -> 3)",
        "errors imports data.rows (1 -> 2)",
    ]
    assert without_floor(graph, floors) == ["cli"]
