"""Where a text ends, and how much of it is certain, against the definition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_jax.request import FinishReason, Request, SamplingParams
from chameleon_jax.serving.stop_strings import certain_text, cut_at_stop

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
    assert certain_text(request) == text[: len(text) - held]
    request.finish_reason = FinishReason.LENGTH
    assert certain_text(request) == text


@settings(max_examples=500, derandomize=True, deadline=None)
@given(pieces=st.lists(TEXT, max_size=5), stops=STOPS)
def test_cut_at_stop(pieces, stops):
    """The text that comes piece by piece is cut where a stop string is first complete."""
    request = make("", stops)
    shown, cut = "", None
    for piece in pieces:
        searched = len(request.text)
        request.text += piece
        cut = cut_at_stop(request, searched)
        if cut is not None:
            break
        assert certain_text(request).startswith(shown)
        shown = certain_text(request)
    whole = "".join(pieces)
    assert (cut is not None) == any(stop in whole for stop in stops)
    assert request.text.startswith(shown)
    if cut is not None:
        assert whole.startswith(request.text + cut)


def test_stop_strings_count_after_min_tokens():
    request = make("aab", ["b"], min_tokens=2)
    request.output_token_ids = [1, 1]
    assert cut_at_stop(request, 0) is None
    request.output_token_ids = [1, 1, 1]
    assert cut_at_stop(request, 0) == "b" and request.text == "aa"
