"""`docs/fields.md` lists every field of completion requests, and says of each what the server does with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.requests import ChatRequest, CompletionRequest, Sampling

ROOT = Path(__file__).resolve().parents[3]
KINDS: dict[str, type[Sampling]] = {"completions": CompletionRequest, "chat": ChatRequest}
BODIES: dict[type[Sampling], dict[str, Any]] = {
    CompletionRequest: {"prompt": "x"},
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
}
ROW = re.compile(r"\| `(\w+)` \| (both|completions|chat) \|(?:.*`(test_\w+)` \|)?")


def rows(section: str) -> list[tuple[str, type[Sampling], str | None]]:
    """Fields of a section of the page, once for each kind of request, with the test that the row names."""
    text = (ROOT / "docs/fields.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    found = [match.groups() for line in text.splitlines() if (match := ROW.match(line))]
    return [(field, KINDS[kind], test) for field, kinds, test in found for kind in KINDS if kinds in (kind, "both")]


def names(fields: list[tuple[str, type[Sampling], str | None]]) -> list[tuple[type[Sampling], str]]:
    return [(kind, field) for field, kind, _ in fields]


TAKEN, IGNORED, REFUSED = rows("Taken"), rows("Accepted and ignored"), rows("Refused")


def test_every_field_has_one_row():
    listed = names([*TAKEN, *IGNORED, *REFUSED])
    assert len(listed) == len(set(listed))
    assert set(listed) == {(kind, field) for kind in KINDS.values() for field in kind.model_fields}


def test_every_field_that_is_taken_names_a_test():
    tests = {
        name for file in (ROOT / "tests/serving").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert {test for *_, test in TAKEN} <= tests


@pytest.mark.parametrize(("kind", "field"), names(IGNORED))
def test_ignored_fields_take_any_value(kind, field):
    for value in ("x", 1, ["x"], {"a": 1}):
        kind.model_validate(BODIES[kind] | {field: value}).check_combinations()


@pytest.mark.parametrize(("kind", "field"), names(REFUSED))
def test_refused_fields_are_named(kind, field):
    with pytest.raises((ValidationError, ApiError), match=f"(?s){field}.*it is not supported, allowed: null"):
        kind.model_validate(BODIES[kind] | {field: {"unsupported": 1}})
