"""Structured outputs: grammars compiled by llguidance, and the tokens that each request's grammar allows next."""

from __future__ import annotations

import collections
import functools
import json
import threading
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par

from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.sampling_params import StructuredOutputsParams

MAX_ITEMS = 500
"""Readings of the text so far that a grammar may have open. With more, a mask and a token take milliseconds on the thread that
runs every request."""
MAX_COMPILED = 256
"""Grammars that stay compiled. The one that was used longest ago goes first."""


@functools.cache
def _threads() -> LLExecutor:
    return LLExecutor()


class Guide:
    """Grammar of one request, and its place in it.

    Args:
        matcher: Matcher in its first state, owned by this guide.
    """

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        """Go past a token of the output. One that the grammar does not allow leaves `error` set."""
        self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Whether the output satisfies the grammar and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Reason for which the grammar cannot go on; None where it can."""
        return _error_of(self._matcher) or None


def fill_masks(guides: Sequence[tuple[int, Guide]], masks: np.ndarray) -> None:
    """Write the tokens that come next in each guide's grammar, as bits, into its row of `masks`, on a few threads.

    Args:
        guides: Rows and their guides.
        masks: `[rows, words]`, int32, contiguous; the lowest bit of a row's first word is token 0. Other rows stay.
    """
    if guides:
        fill_next_token_bitmask_par(_threads(), [(guide._matcher, row) for row, guide in guides], masks)


class Vocabulary:
    """Tokens and their bytes, in the form in which llguidance wants a tokenizer.

    llguidance could read `tokenizer.json` itself. It finds other bytes than ours for some kinds of tokenizers, among them those
    with a Metaspace decoder, and outputs would leave their grammar by a "▁" in place of each space.

    Args:
        tokens: Bytes that each token adds to a text, by id; none for ids without a token.
        special_token_ids: Ids that no grammar allows, unless it names them.
        encode: Text to token ids, without special tokens around them.
    """

    bos_token_id = None
    eos_token_id = 0  # LLTokenizer is told the right ones

    def __init__(self, tokens: Sequence[bytes], special_token_ids: Sequence[int], encode: Callable[[str], list[int]]):
        self.tokens, self.special_token_ids = list(tokens), list(special_token_ids)
        special = set(special_token_ids)
        self._ids = {data: i for i, data in enumerate(tokens) if data and i not in special}
        self._longest = max(map(len, self._ids), default=0)
        self._encode = encode

    def __call__(self, data: bytes) -> list[int]:
        """Tokenise bytes that a grammar leaves no choice about: as the tokenizer does, unless that adds a space in front."""
        ids = self._encode(data.decode(errors="replace"))
        text = b"".join(self.tokens[i] for i in ids)
        if text == data:
            return ids
        if text == b" " + data and self.tokens[ids[0]] == b" ":
            return ids[1:]
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """Take the longest token at each place, up to a byte that has none."""
        ids: list[int] = []
        while data:
            lengths = range(min(self._longest, len(data)), 0, -1)
            length = next((n for n in lengths if data[:n] in self._ids), 0)
            if not length:
                break
            ids.append(self._ids[data[:length]])
            data = data[length:]
        return ids


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe.

    Args:
        vocabulary: The model's tokens, as many as it can draw.
        eos_token_ids: Ids that end an output where its grammar allows the end, one at least.

    Raises:
        InvalidGrammar: There is no end-of-sequence id, or llguidance cannot use the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Sequence[int]):
        if not eos_token_ids:  # llguidance would take token 0
            raise InvalidGrammar("the model has no end-of-sequence id")
        try:
            wrapper = TokenizerWrapper(vocabulary)
            self._tokenizer = LLTokenizer(wrapper, len(vocabulary.tokens), list(eos_token_ids))
        except Exception as error:  # the library raises no narrower type
            raise InvalidGrammar(f"the model's tokenizer cannot be guided: {error}") from error
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[StructuredOutputsParams, LLMatcher] = collections.OrderedDict()

    def guide(self, params: StructuredOutputsParams) -> Guide:
        """Make the guide of one request. Takes milliseconds at the first use of a grammar, seconds for a very large one.

        Raises:
            InvalidGrammar: The schema, expression or grammar is wrong or not supported; says why.
        """
        with self._lock:
            matcher = self._compiled.get(params)
            if matcher is not None:
                self._compiled.move_to_end(params)
        if matcher is None:
            matcher = self._compile(params)
            with self._lock:
                self._compiled[params] = matcher
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy())

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, _grammar(params), log_level=0, limits=LLParserLimits(max_items_in_row=MAX_ITEMS))
        if matcher.is_error():
            kind = params.kind
            raise InvalidGrammar(f"{kind} is {getattr(params, kind)!r:.200}; it cannot be compiled: {_error_of(matcher)}")
        return matcher


def _error_of(matcher: LLMatcher) -> str:
    """Return the reason of an error on one line, without the state and the grammar that follow it; empty without an error."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())[:500]


def _grammar(params: StructuredOutputsParams) -> str:
    """Return the grammar in llguidance's own form."""
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(params.grammar)
    if params.choice is not None:
        choices = " | ".join(json.dumps(text) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")  # one lexeme: rules are limited to 2000
    schema = '{"type": "object"}' if params.json is None else str(params.json)
    pattern = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(schema, overrides=None if pattern is None else {"whitespace_pattern": pattern})
