"""Parameters of a request: sampling, the end of the output, and the adapter."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

from chameleon_jax.checks import require_field

MAX_STOP_IDS = 8
"""Most stop ids of a request."""
MAX_STOPS = 16
"""Most stop strings of a request."""
MAX_STOP_LEN = 256
"""Most characters of a stop string. After each token the end of the text is compared with every stop string."""
MAX_LOGPROBS = 20
"""Most alternatives that are reported for each token."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """Form that an output is constrained to. Exactly one field is set; names are vLLM's."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling of tokens, and the end of the output. Names and defaults are vLLM's.

    Attributes:
        temperature: divisor of the logits, 0 to 100 (default 1). 0 picks the likeliest token, and so does a value below
            1.2e-38, by which float32 cannot divide.
        top_p: share of the probability mass that is kept, in (0, 1] (default 1).
        top_k: number of likeliest tokens that are kept. 0 (default) or -1 keeps all; 1 picks the likeliest.
        min_p: least probability that is kept, relative to the likeliest token's, 0 to 1 (default 0).
        seed: seed of the draws. The same seed gives the same text in any batch. None (default): the engine draws one.
        max_tokens: most output tokens, 1 or more (default 16).
        min_tokens: output tokens before which no stop id is drawn, unless nothing else can be, and stop strings do not count
            (default 0).
        stop: strings that end the output (default none), at most 16 of 1 to 256 characters. The one that is complete first
            ends it, and is not part of it.
        stop_token_ids: ids that end the output beside the model's end-of-sequence ids, at most 8 together with those.
        ignore_eos: generate past the model's end-of-sequence ids (default False).
        logprobs: number of alternatives reported for each token, 0 to 20. None (default) reports no log-probabilities.
        skip_special_tokens: leave special tokens out of the text (default True).
        include_stop_str_in_output: keep the stop string, or the text of the stop id, that ends the output (default False).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for field in ("temperature", "top_p", "min_p"):
            require_field(self, field, isinstance(getattr(self, field), numbers.Real), "a number")
        for field in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
            value = getattr(self, field)
            if value is None and field in ("seed", "logprobs"):
                continue
            require_field(self, field, isinstance(value, numbers.Integral), "an integer")
            object.__setattr__(self, field, int(value))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require_field(self, "temperature", 0 <= self.temperature <= 100, "0 to 100")
        require_field(self, "top_p", 0 < self.top_p <= 1, "above 0, at most 1")
        require_field(self, "top_k", -1 <= self.top_k < 2**31, "-1 or 0 (all), or 1 and more")
        require_field(self, "min_p", 0 <= self.min_p <= 1, "0 to 1")
        require_field(self, "seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        require_field(self, "max_tokens", self.max_tokens >= 1, "1 or more")
        require_field(self, "min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        require_field(self, "stop", len(self.stop) <= MAX_STOPS, f"at most {MAX_STOPS} strings")
        texts = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LEN for s in self.stop)
        require_field(self, "stop", texts, f"strings of 1 to {MAX_STOP_LEN} characters")
        require_field(self, "stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
        require_field(self, "logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")

    def fit(self, prompt_len: int, max_model_len: int) -> SamplingParams:
        """Lower max_tokens to the room behind the prompt, one token at least.

        Args:
            prompt_len: Tokens of the prompt.
            max_model_len: Tokens of prompt and output together.

        Raises:
            ValueError: min_tokens is more than the room.
        """
        room = max(1, max_model_len - prompt_len)
        return self if self.max_tokens <= room else dataclasses.replace(self, max_tokens=room)


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Adapter of a request.

    Attributes:
        name: name of the adapter.
        path: PEFT directory of the adapter, needed only when the name is used for the first time or given other content.
        load_inplace: read `path` again even if the name was read from it before, since its files may have changed (default
            False).
    """

    name: str
    path: str | None = None
    load_inplace: bool = False
