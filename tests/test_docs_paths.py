"""What README, docs and CONTRIBUTING name exists: paths, links, modules and imports."""

import pkgutil
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "accelerate_configs/README.md"]
)
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PAGES}

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.<$-])[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|sbatch)\b")
SHIPPED = re.compile(r"\b(?:accelerate_configs|recipes|launch|slurm|benchmarks)/[\w.-]+\.\w+")
MODULE = re.compile(r"\borpo_dist(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^\s*((?:from orpo_dist[\w.]* import [\w, ]+)|(?:import orpo_dist[\w.]*))", re.MULTILINE)


def without_web_links(text: str) -> str:
    return re.sub(r"\[[^\]]*\]\(https?://[^)]*\)|https?://\S+", "", text)


def exists(name: str) -> bool:
    """A path of the checkout or of the package; a bare file name may be anywhere in either."""
    if (REPOSITORY / name).exists() or (REPOSITORY / "orpo_dist" / name).exists():
        return True
    folders = ("orpo_dist", "tests", "benchmarks", "slurm", "launch")
    return "/" not in name and any(next((REPOSITORY / folder).rglob(name), None) for folder in folders)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TEXTS, "Makefile"])
def test_named_files_exist(page):
    text = without_web_links(TEXTS.get(page) or (REPOSITORY / page).read_text(encoding="utf-8"))
    named = {*PATH.findall(text), *SHIPPED.findall(text)}
    assert not sorted(name for name in named if not exists(name))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(TEXTS[page]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", TEXTS)
def test_named_modules_exist(page):
    """`orpo_dist.x.y` in a page is a module, or a name in one."""
    missing = []
    for name in sorted(set(MODULE.findall(without_web_links(TEXTS[page])))):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def test_imports_work():
    lines = sorted({line.strip() for text in TEXTS.values() for line in IMPORT.findall(text)})
    assert any(line.startswith("from orpo_dist import ORPOConfig") for line in lines)
    for line in lines:
        exec(line, {})


@pytest.mark.parametrize("name", ["docs/missing.py", "training/missing.py", "missing.py"])
def test_a_missing_file_is_seen(name):
    assert PATH.findall(f"see `{name}`.") == [name] and not exists(name)
