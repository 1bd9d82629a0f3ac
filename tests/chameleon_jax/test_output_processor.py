"""Where a text ends, and how much of it is certain, against the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_jax.output_processor import stable_text, trim_at_stop
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams

TEXT = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3)


def make(text: str, stops: list[str], **params) -> Request:
    request = Request("r", [1], SamplingParams(stop=stops, **params), 0.0, 0)
    request.text = text
    return request


@settings(max_examples=500, derandomize=True, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_certain_text(text, stops):
    """What stays whatever follows: all but the longest end that begins a stop string."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    request = make(text, stops)
    assert stable_text(request) == text[: len(text) - held]
    request.finish_reason = FinishReason.LENGTH
    assert stable_text(request) == text


def ended(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, read letter by letter, and that string."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(pieces=st.lists(TEXT, max_size=5), stops=STOPS, include=st.booleans())
def test_cut_at_stop(pieces, stops, include):
    """However the text comes in pieces, it ends where a stop string is first complete; no letter is shown and taken back."""
    request = make("", stops, include_stop_str_in_output=include)
    shown, cut = "", None
    for piece in pieces:
        searched = len(request.text)
        request.text += piece
        cut = trim_at_stop(request, searched)
        if cut is not None:
            request.finish_reason = FinishReason.STOP
            break
        assert stable_text(request).startswith(shown)
        shown = stable_text(request)
    text, stop = ended("".join(pieces), stops)
    assert cut == stop
    assert request.text == (text + stop if include and stop is not None else text)
    assert request.text.startswith(shown)


@pytest.mark.parametrize(
    ("text", "stops", "rest", "stop"),
    [
        ("one. two\nthree", ["\n", "."], "one", "."),  # the first in the text, not in the list
        ("a with b", [" with"], "a", " with"),
        (" with b", [" with", "with"], "", " with"),  # both end at one place: the longest
        ("xabcy", ["abcy", "bc"], "xa", "bc"),  # complete first, as if it had come letter by letter
        ("xab", ["ab", "xab"], "", "xab"),
    ],
)
def test_of_several_in_one_token_the_first_that_is_complete_ends_the_text(text, stops, rest, stop):
    for order in (stops, stops[::-1]):
        for include in (False, True):
            request = make(text, order, include_stop_str_in_output=include)
            assert trim_at_stop(request, 0) == stop
            assert request.text == (rest + stop if include else rest)


def test_nothing_is_held_back_where_the_stop_string_stays():
    assert stable_text(make("aa", ["ab"], include_stop_str_in_output=True)) == "aa"


def test_stop_strings_count_after_min_tokens():
    request = make("aab", ["b"], min_tokens=2)
    request.output_token_ids = [1, 1]
    assert trim_at_stop(request, 0) is None
    request.output_token_ids = [1, 1, 1]
    assert trim_at_stop(request, 0) == "b" and request.text == "aa"
