"""What is asked of a request: how tokens are chosen, when to stop, and with which adapter."""

from __future__ import annotations

import dataclasses
import numbers
import reprlib
from collections.abc import Sequence

MAX_STOP_IDS = 8
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_STOP_LEN = 256
"""Characters of a stop string: after each token the text's end is compared with every one of them."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names and defaults are vLLM's.

    Attributes:
        temperature: 0 is greedy, and so is a value below 1.2e-38, by which float32 cannot divide. No other is changed.
        top_p: share of the probability mass that is kept, in (0, 1].
        top_k: tokens that are kept; 0 or -1 keeps all, 1 is greedy.
        min_p: least probability, relative to the best token's, that is kept.
        seed: the same seed gives the same text however the request was batched; None: the engine draws one.
        max_tokens: output tokens at most.
        min_tokens: stop ids cannot be drawn before that many, unless there is nothing else.
        stop: strings that end the output, the first to be complete; they are not part of it.
        stop_token_ids: ids that end the output, beside the model's own.
        ignore_eos: go on past the model's end-of-sequence ids.
        logprobs: how many alternatives to report for each token, 0 to 20; None reports none.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, or the text of the id, that ends the output.
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

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"{field} is {reprlib.repr(getattr(self, field))}; allowed: {allowed}")

        for field in ("temperature", "top_p", "min_p"):
            require(isinstance(getattr(self, field), numbers.Real), field, "a number")
        for field in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
            value = getattr(self, field)
            require(
                isinstance(value, numbers.Integral) or (value is None and field in ("seed", "logprobs")), field, "an integer"
            )
            object.__setattr__(self, field, value if value is None else int(value))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require(0 <= self.temperature <= 100, "temperature", "0 to 100")
        require(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (all), or 1 and more")
        require(0 <= self.min_p <= 1, "min_p", "0 to 1")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        require(self.max_tokens >= 1, "max_tokens", "1 or more")
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "0 to max_tokens")
        require(len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings")
        texts = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LEN for s in self.stop)
        require(texts, "stop", f"strings of 1 to {MAX_STOP_LEN} characters")
        require(len(self.stop_token_ids) <= MAX_STOP_IDS, "stop_token_ids", f"at most {MAX_STOP_IDS} ids")
        require(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}")


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Names an adapter.

    Attributes:
        path: PEFT directory, needed only the first time the name is used, or to replace it.
        load_inplace: read `path` also where the name was read from it before: its files may have changed.
    """

    name: str
    path: str | None = None
    load_inplace: bool = False
