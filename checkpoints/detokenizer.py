"""Token ids to text, one token at a time.

A tokenizer's decoder takes a whole list of tokens. It removes the space at the start of the text and replaces part of a
character by U+FFFD. Here each token stands for its bytes, which are determined once. The bytes of all tokens, joined, are the
text.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
from collections.abc import Iterable, Sequence

import tokenizers

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_NO_CHARACTER = "\ufffd"
_LONGEST_PART = 3
"""Most bytes of an incomplete character."""
_CONTEXT = 256
"""Most tokens read from the end of a prompt. Chat templates end with a few special tokens, not with hundreds."""


class TokenBytes:
    """Bytes that each token adds to a text.

    Attributes:
        special_ids: ids of tokens that a text may leave out.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._inside: dict[int, bytes] = {}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)

    def inside(self, token_id: int) -> bytes:
        """Bytes of a token behind others; none for an unknown id."""
        found = self._inside.get(token_id)
        if found is None:
            found = self._inside[token_id] = self._find(token_id, [] if self._word is None else [self._word])
        return found

    def at_start(self, token_id: int) -> bytes:
        """Bytes of a token at the start of a text, where many tokenizers remove its space."""
        return self._find(token_id, [])

    def left_out(self, skip_special_tokens: bool) -> frozenset[int]:
        """Ids that a text leaves out."""
        return self.special_ids if skip_special_tokens else frozenset()

    def have_text(self, ids: Iterable[int], left_out: frozenset[int]) -> bool:
        """Whether any of the tokens adds bytes to a text without those in `left_out`."""
        return any(i not in left_out and self.inside(i) for i in ids)

    def end_of(self, prompt_token_ids: Sequence[int], left_out: frozenset[int]) -> bytes:
        """Bytes at the end of a prompt, with every byte of an incomplete last character; none where it has no text."""
        last = itertools.islice(reversed(prompt_token_ids), _CONTEXT)
        data = filter(None, (self.inside(i) for i in last if i not in left_out))
        return b"".join(reversed(list(itertools.islice(data, _LONGEST_PART))))

    @functools.cached_property
    def _word(self) -> int | None:
        """Id of a token behind which others decode as they do inside a text; None where there is none."""
        for i in range(self._backend.get_vocab_size()):
            if i not in self._added and self._decode([i]).isalnum() and not _BYTE_TOKEN.fullmatch(self._token(i)):
                return i
        return None

    def _token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def _find(self, token_id: int, before: list[int]) -> bytes:
        prefix, text = self._decode(before), self._decode([*before, token_id])
        if text.startswith(prefix) and _NO_CHARACTER not in text:
            return text[len(prefix) :].encode()
        token = self._token(token_id)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        if token_id not in self._added and all(character in _gpt2_bytes() for character in token):
            return bytes(_gpt2_bytes()[character] for character in token)
        return (text[len(prefix) :] if _NO_CHARACTER in token else token).encode()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class DetokenizerStream:
    """Text of one request, token by token.

    Args:
        tokens: bytes of the tokenizer's tokens.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: tokens before the first. A text that continues a prompt keeps its leading space, and completes the
            character in which the prompt ends.

    Attributes:
        pending: bytes of an incomplete character.
    """

    def __init__(self, tokens: TokenBytes, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()):
        self._tokens = tokens
        self._left_out = tokens.left_out(skip_special_tokens)
        self.pending = tokens.end_of(prompt_token_ids, self._left_out)
        self._begun = bool(self.pending)
        self._decode(b"")

    def append(self, token_id: int) -> str:
        """Add a token and return the text that became final, never part of a character."""
        if token_id in self._left_out:
            return ""
        data = self._tokens.inside(token_id)
        if not self._begun:
            self._begun, data = bool(data), self._tokens.at_start(token_id)
        return self._decode(data)

    def flush(self) -> str:
        """End the text and return the rest: U+FFFD for an incomplete character."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool = False) -> str:
        data = self.pending + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self.pending = data[used:]
        return text


def shown(data: bytes) -> str:
    """Show the bytes of a token as text; part of a character in OpenAI's form, which tells different tokens apart."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + data.decode(errors="backslashreplace")


@functools.cache
def _gpt2_bytes() -> dict[str, int]:
    """Map each character of a byte-level token to its byte: its own code if printable, else the next unused byte in order."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    rest = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {character: ord(character) if ord(character) < 256 else next(rest) for character in alphabet}
