"""Prose names its nouns: see `tests/prose.py` for the clauses that are counted."""

from pathlib import Path

import pytest

from tests.prose import examine, offences

PER_THOUSAND_WORDS = 0.3

ROOT = Path(__file__).parents[1]


def test_headless_clauses_stay_rare() -> None:
    found, words = examine([ROOT])
    assert words > 20_000
    listing = "\n".join(str(offence) for offence in found)
    assert 1000 * len(found) <= PER_THOUSAND_WORDS * words, f"{len(found)} headless clauses in {words} words:\n{listing}"


@pytest.mark.parametrize(
    "sentence",
    [
        "What an engine says of itself.",
        "Covers the pieces of what is on the way.",
        "Frees the memory and drops what is left.",
        "Does what others ask for.",
        "Whoever waited keeps its place.",
        "A load that nobody waits for.",
        "Larger than that of the pool.",
        "Its pages and those of its adapter.",
        "Of a request that comes now.",
        "port: Of HTTP; 0: any.",
        "Who runs next.",
        "The certificate of who signed it.",
    ],
)
def test_a_headless_clause_is_counted_once(sentence: str) -> None:
    assert len(list(offences(sentence))) == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "What is a page?",
        "The error says what is allowed.",
        "Decides who starts next.",
        "Prints what to try.",
        "At what rate the link moves bytes.",
        "The test shows that of ten requests one fails.",
        "Clients who wait get 429.",
        "Of ten requests, one failed.",
        "Pages that hold the adapter.",
    ],
)
def test_a_clause_with_its_noun_or_a_question_is_not_counted(sentence: str) -> None:
    assert not list(offences(sentence))


def test_code_and_quotations_are_not_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('The field `what is` and the question "what is left".\n\n```\nwhat is code\n```\n\nAnd what is prose.\n')
    found, _ = examine([page])
    assert [offence.line for offence in found] == [7]


def test_docstrings_comments_and_help_are_read_with_their_lines(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""Title.\n\nKeep what is left.\n"""\n\nx = "what is data"\n# keep\n# what is left\noption(help="What is left.")\n'
    )
    found, _ = examine([module])
    assert sorted(offence.line for offence in found) == [3, 8, 9]
