"""What the pages say of the code is what the code says: commands parse, examples run, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from para_jax import BiasConfig, ParaConfig, adapter_cost
from para_jax.cli import parser
from para_jax.config import BackboneConfig
from tests.test_package import IMPORTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The command lines of para-jax in a page's code, each in one line; shell scripts with variables are left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ").partition("  # ")[0] for line in text.splitlines()]
    return [line for line in lines if re.match(r"para-jax [a-z]", line) and not re.search(r"\$[A-Za-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, and there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path) -> None:
    for line in commands(page):
        parser().parse(shlex.split(line)[1:])  # raises for an option that there is not


def test_there_are_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 8 and sum(len(commands(page)) for page in PAGES) >= 15


@pytest.mark.slow
def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 20 and "steps=250" in example
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(example.replace("steps=250", "steps=2"), "README.md", "exec"), found)
    assert len(found["texts"]) == 3 and set(found["scores"]) == {"mood", "place", "question"}
    assert {path.name for path in Path("runs", "stories").iterdir() if path.is_dir()} >= {"mood", "place", "question"}


def test_the_table_of_families() -> None:
    table = "\n".join(runpy.run_path(str(DOCS / "families_table.py"))["lines"]())
    assert table in (DOCS / "families.md").read_text(), "run python docs/families_table.py and put it into the page"


# Adding a method

METHOD = (DOCS / "adding_a_method.md").read_text(encoding="utf-8")
# The module of the method that docs/adding_a_method.md walks through, and where it is entered.
FILE, ENTRIES = "para_jax/adapters/bias.py", ("para_jax/adapters/registry.py", "para_jax/__init__.py")


def blocks(language: str) -> list[str]:
    """The code of one language on the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", METHOD, re.MULTILINE | re.DOTALL)


def test_the_code_of_a_method_is_that_of_its_file() -> None:
    shown, code = blocks("python"), (ROOT / FILE).read_text(encoding="utf-8")
    assert len(shown) == 7
    for block in shown:
        assert block in code, "copy it again from the file"


def test_the_lines_of_a_method() -> None:
    """Its own file, which is short, and its entries, which are shown."""
    counts = dict(re.findall(r"^\| `([\w./]+)` \| (\d+) \|$", METHOD, re.MULTILINE))
    own = (ROOT / FILE).read_text(encoding="utf-8").splitlines()
    assert int(counts.pop(FILE)) == len(own) <= 150
    for path, diff in zip(ENTRIES, blocks("diff"), strict=True):
        added = [line.removeprefix("+") for line in diff.splitlines()]
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert added == [line for line in lines if "BiasConfig" in line], path
        assert int(counts.pop(path)) == len(added)
    assert not counts


def test_nothing_else_knows_of_a_method() -> None:
    """Of all modules the registry alone imports it, and no other names it."""
    module = FILE.removesuffix(".py").replace("/", ".")
    assert [name for name, others in IMPORTS.items() if module in others] == ["para_jax.adapters.registry"]
    named = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "para_jax").rglob("*.py")
        if re.search(r"\bBias(Config|Layer)\b", path.read_text(encoding="utf-8"))
    ]
    assert sorted(named) == sorted([FILE, *ENTRIES])


@pytest.mark.parametrize(
    ("config", "size", "megabytes"), [(BiasConfig(), "1,359,872", 2.72), (ParaConfig(), "8,945,664", 1.23)]
)
def test_what_a_method_costs(config: BiasConfig | ParaConfig, size: str, megabytes: float) -> None:
    cost = adapter_cost(config, BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128))
    assert f"{cost.parameters:,}" == size and size in METHOD
    assert round(cost.in_flight / 1e6, 2) == megabytes and f"{megabytes} MB" in METHOD
