"""The documentation names files and tests that exist, and its site has every page."""

import pydoc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
CODE = re.compile(r"`([^`\n]+)`")


@pytest.fixture(scope="module")
def tests_source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    paths = {
        code
        for code in CODE.findall(page.read_text(encoding="utf-8"))
        if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|json|md|proto)", code)
    }
    roots = (ROOT, ROOT / "chameleon_jax", ROOT / "models")
    assert {path for path in paths if not any((root / path).is_file() for root in roots)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_in_a_page_exist(page: Path, tests_source: str) -> None:
    names = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert {name for name in names if f"def {name}(" not in tests_source} == set()


def test_every_page_is_in_the_site_and_readme_links_to_it() -> None:
    navigation, readme = (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
        assert f"(docs/{page.name})" in readme


def test_names_of_the_api_page_exist() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if pydoc.locate(name) is None] == []
