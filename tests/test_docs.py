"""The documentation names files and tests that exist, and its site has every page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
COMING = {"serving/adapters.py"}
"""Files that the architecture page names and a later change adds."""
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
    assert {path for path in paths if not any((root / path).is_file() for root in roots)} <= COMING


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_in_a_page_exist(page: Path, tests_source: str) -> None:
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests_source, name


def test_every_page_is_in_the_site_and_readme_links_to_it() -> None:
    navigation, readme = (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
        assert f"(docs/{page.name})" in readme
