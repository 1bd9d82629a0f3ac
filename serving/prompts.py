"""Prompts as token ids."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import InvalidValue

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or `{"prompt_token_ids": [...]}`."""

LONG_PROMPT = 2000
"""Characters from which a prompt is tokenised in a thread: it takes about a millisecond."""


def tokens_of(prompt: Prompt, tokenizer: Tokenizer | None, add_special_tokens: bool = True) -> Sequence[int]:
    """Return the token ids of a prompt. Raises ValueError."""
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or not {"prompt", "prompt_token_ids"} & prompt.keys():
            raise ValueError(f"prompt has the keys {sorted(prompt)}; allowed: prompt_token_ids or prompt")
        return tokens_of(next(iter(prompt.values())), tokenizer, add_special_tokens)
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("the model has no tokenizer (load_format='dummy'): give prompts as token ids")
    try:
        return tokenizer.encode(prompt, add_special_tokens)
    except TypeError as error:  # from tokenizers, for text that cannot be UTF-8
        text = "prompt has a lone surrogate; allowed: text that can be encoded as UTF-8"
        raise InvalidValue("prompt", text) from error


class PromptReader:
    """`tokens_of` for an asyncio loop, which goes on meanwhile.

    Args:
        max_len: Tokens of the longest prompt.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_len: int):
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def read(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt. Raises ValueError, for a text too long to fit without tokenising it."""
        job = functools.partial(tokens_of, prompt, self._tokenizer, add_special_tokens)
        if not isinstance(prompt, str) or len(prompt) < LONG_PROMPT:
            return list(job())
        if self._tokenizer is not None and len(prompt) > (most := self._max_len * self._tokenizer.longest_token):
            text = f"prompt has {len(prompt)} characters; allowed: {most}, as max_model_len is {self._max_len}"
            raise InvalidValue("prompt", text)
        return list(await asyncio.get_running_loop().run_in_executor(self._thread, job))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
