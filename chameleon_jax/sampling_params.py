"""Parameters of a request: sampling, the end of the output, and the adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from chameleon_jax.checks import require, require_field
from chameleon_jax.errors import InvalidGrammar, InvalidValue

MAX_STOP_IDS = 8
"""Most stop ids of a request."""
MAX_STOPS = 16
"""Most stop strings of a request."""
MAX_STOP_LEN = 256
"""Most characters of a stop string. After each token the end of the text is compared with every stop string."""
MAX_LOGPROBS = 20
"""Most alternatives that are reported for each token."""
MAX_MIXED_LORAS = 8
"""Most adapters of a request."""
MAX_LOGIT_BIAS = 300
"""Most tokens that a request's `logit_bias` names."""
MAX_GRAMMAR_LEN = 1 << 16
"""Most characters of a schema, a regular expression, a grammar, or all choices."""


GRAMMAR_KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""Fields of `StructuredOutputsParams` of which one is given."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """Language of the output: exactly one of the first five. Names are vLLM's. Raises InvalidGrammar.

    Attributes:
        json: JSON schema that the output satisfies, as text or as a mapping.
        regex: regular expression that the whole output matches.
        choice: texts of which the output is one.
        grammar: grammar of the output in Lark's notation, with llguidance's additions.
        json_object: True: the output is any JSON object.
        whitespace_pattern: regular expression of the whitespace between the parts of JSON, for `json` and `json_object`. None
            (default) allows any.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        try:
            self._check()
        except ValueError as error:
            raise InvalidGrammar(str(error)) from error

    @property
    def kind(self) -> str:
        """The field of GRAMMAR_KINDS that is given. Raises ValueError where it is none or several."""
        given = [kind for kind in GRAMMAR_KINDS if getattr(self, kind) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} is set; allowed: one of {', '.join(GRAMMAR_KINDS)}")
        return given[0]

    def _check(self) -> None:
        kind = self.kind
        for field in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, field)
            require_field(self, field, value is None or (isinstance(value, str) and value != ""), "a text that is not empty")
        require_field(self, "json_object", self.json_object in (None, False, True), "true or null")
        if self.choice is not None:
            listed = isinstance(self.choice, Sequence) and not isinstance(self.choice, str) and len(self.choice) > 0
            texts = listed and all(isinstance(text, str) and text for text in self.choice)
            require_field(self, "choice", texts, "a list of texts, none of them empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.whitespace_pattern is not None and kind not in ("json", "json_object"):
            raise ValueError(f"whitespace_pattern is set; allowed: only together with json or json_object, not {kind}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        length = sum(len(str(text)) for text in (self.regex, self.grammar, self.json, *(self.choice or ())) if text is not None)
        if length > MAX_GRAMMAR_LEN:
            raise ValueError(f"{kind} has {length} characters; allowed: {MAX_GRAMMAR_LEN}")


def _schema_text(schema: Any) -> str:
    """Return a JSON schema as text. Raises ValueError for a value that is none."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping | bool):
            raise ValueError("a schema is an object, true or false")
        return json.dumps(parsed, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json is {schema!r:.80}; allowed: a JSON schema ({error})") from error


class _CheckedIds(tuple[int, ...]):
    """Integers, as was checked: copies of the parameters, one for each choice of a request, share them without a look."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling of tokens, and the end of the output. Names and defaults are vLLM's.

    Attributes:
        temperature: divisor of the logits, 0 to 100 (default 1). 0 picks the likeliest token, and so does a value below
            1.2e-38, by which float32 cannot divide.
        top_p: share of the probability mass that is kept, in (0, 1] (default 1).
        top_k: number of likeliest tokens that are kept. 0 (default) or -1 keeps all; 1 picks the likeliest.
        min_p: least probability that is kept, relative to the likeliest token's, 0 to 1 (default 0).
        presence_penalty: subtracted from the logit of each token that the output has, -2 to 2 (default 0).
        frequency_penalty: subtracted from the logit of a token for each time that the output has it, -2 to 2 (default 0).
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of the tokens that the prompt or the
            output has, above 0 (default 1).
        logit_bias: amounts, -100 to 100, that are added to the logits of tokens, by id; at most 300. None (default): none.
        allowed_token_ids: ids that alone can be drawn, not together with structured_outputs. None (default): all.
        structured_outputs: language of the output. None (default): any text.
        seed: seed of the draws. The same seed gives the same text in any batch. None (default): the engine draws one.
        max_tokens: most output tokens, 1 or more (default 16).
        min_tokens: output tokens before which no stop id is drawn, unless nothing else can be, and stop strings do not count
            (default 0).
        stop: strings that end the output (default none), at most 16 of 1 to 256 characters. The one that is complete first
            ends it, and is not part of it.
        stop_token_ids: ids that end the output beside the model's end-of-sequence ids, at most 8 together with those.
        ignore_eos: generate past the model's end-of-sequence ids (default False).
        logprobs: number of alternatives reported for each token, 0 to 20. None (default) reports no log-probabilities.
        prompt_logprobs: number of alternatives reported for each token of the prompt behind the first, 0 to 20. None (default)
            reports no log-probabilities.
        skip_special_tokens: leave special tokens out of the text (default True).
        include_stop_str_in_output: keep the stop string, or the text of the stop id, that ends the output (default False).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            require_field(self, field, isinstance(getattr(self, field), numbers.Real), "a number")
        for field in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is None and field in ("seed", "logprobs", "prompt_logprobs"):
                continue
            require_field(self, field, isinstance(value, numbers.Integral), "an integer")
            object.__setattr__(self, field, int(value))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require_field(self, "temperature", 0 <= self.temperature <= 100, "0 to 100")
        require_field(self, "top_p", 0 < self.top_p <= 1, "above 0, at most 1")
        require_field(self, "top_k", -1 <= self.top_k < 2**31, "-1 or 0 (all), or 1 and more")
        require_field(self, "min_p", 0 <= self.min_p <= 1, "0 to 1")
        for field in ("presence_penalty", "frequency_penalty"):
            require_field(self, field, -2 <= getattr(self, field) <= 2, "-2 to 2")
        require_field(self, "repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, finite")
        self._check_tokens()
        require_field(self, "seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        require_field(self, "max_tokens", self.max_tokens >= 1, "1 or more")
        require_field(self, "min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        require_field(self, "stop", len(self.stop) <= MAX_STOPS, f"at most {MAX_STOPS} strings")
        texts = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LEN for s in self.stop)
        require_field(self, "stop", texts, f"strings of 1 to {MAX_STOP_LEN} characters")
        require_field(self, "stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            require_field(self, field, value is None or 0 <= value <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")

    def _check_tokens(self) -> None:
        """Check the fields that name tokens; the engine checks that the vocabulary has them."""
        if self.logit_bias is not None:
            require_field(self, "logit_bias", isinstance(self.logit_bias, Mapping), "a mapping from token ids to numbers")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
            fits = len(self.logit_bias) <= MAX_LOGIT_BIAS
            require_field(self, "logit_bias", fits, f"at most {MAX_LOGIT_BIAS} tokens")
            ids = all(isinstance(token, numbers.Integral) for token in self.logit_bias)
            require_field(self, "logit_bias", ids, "token ids as keys")
            amounts = all(isinstance(bias, numbers.Real) and -100 <= bias <= 100 for bias in self.logit_bias.values())
            require_field(self, "logit_bias", amounts, "amounts of -100 to 100")
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, _CheckedIds):
                object.__setattr__(self, "allowed_token_ids", _CheckedIds(self.allowed_token_ids))
                ids = all(isinstance(token, numbers.Integral) for token in self.allowed_token_ids)
                require_field(self, "allowed_token_ids", ids and len(self.allowed_token_ids) > 0, "token ids, at least one")
            if self.structured_outputs is not None:  # the two may leave no token
                text = "allowed_token_ids is set; allowed: not together with structured_outputs"
                raise InvalidValue("allowed_token_ids", text)

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before a token is drawn, by more than the temperature."""
        return (
            self.penalises or bool(self.logit_bias) or self.allowed_token_ids is not None or self.structured_outputs is not None
        )

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
        path: PEFT directory of the adapter or its URL, needed only when the name is used for the first time or given other
            content.
        load_inplace: read `path` again even if the name was read from it before, since its files may have changed (default
            False).
    """

    name: str
    path: str | None = None
    load_inplace: bool = False

    @property
    def members(self) -> tuple[tuple[LoRARequest, float], ...]:
        """Adapters with their weights; here this one."""
        return ((self, 1.0),)

    def known(self) -> LoRARequest:
        """Return the same adapter for a further request, which need not read it again."""
        return dataclasses.replace(self, load_inplace=False)


@dataclasses.dataclass(frozen=True)
class LoRAMix(LoRARequest):
    """Several adapters of one request: the sum of their updates, each times its weight.

    It is what PEFT's `add_weighted_adapter` makes with `combination_type="cat"`: ranks add up.

    Attributes:
        name: the sum as text, such as "0.7*bard+0.3*bible".
        loras: 1 to 8 adapters, each name once.
        weights: finite weight of each adapter. Empty (default): each has the weight 1.
    """

    name: str = dataclasses.field(init=False)
    path: None = dataclasses.field(init=False, default=None)
    load_inplace: bool = dataclasses.field(init=False, default=False)
    loras: Sequence[LoRARequest]
    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        loras = tuple(self.loras)
        names = [lora.name for lora in loras]
        require(1 <= len(loras) <= MAX_MIXED_LORAS, "loras", names, f"1 to {MAX_MIXED_LORAS} adapters")
        require(len(set(names)) == len(names), "loras", names, "each name once")
        weights = tuple(self.weights) or (1.0,) * len(loras)
        numeric = all(isinstance(weight, numbers.Real) and math.isfinite(weight) for weight in weights)
        require(numeric and len(weights) == len(loras), "weights", weights, "a finite number for each adapter")
        object.__setattr__(self, "loras", loras)
        object.__setattr__(self, "weights", tuple(float(weight) for weight in weights))
        object.__setattr__(self, "name", "+".join(f"{weight:g}*{lora.name}" for lora, weight in self.members))

    @property
    def members(self) -> tuple[tuple[LoRARequest, float], ...]:
        """Adapters with their weights."""
        return tuple(zip(self.loras, self.weights))

    def known(self) -> LoRAMix:
        """Return the same adapters for a further request, which need not read them again."""
        return dataclasses.replace(self, loras=[lora.known() for lora in self.loras])
