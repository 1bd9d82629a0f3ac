"""Random requests of the load generator: prompts, arrival times, and the models that they name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chameleon_jax.checks import require_field

if TYPE_CHECKING:
    import tokenizers

ASSIGNMENTS = ("random", "round-robin")
TOKEN_IDS = (100, 10_000)
"""Range of random token ids where no tokenizer is given: every vocabulary of use has them, and special ids lie outside."""
WORDS = ("of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his", "they", "at")
"""Words that are one token each, with the space before them, in the usual vocabularies."""


@dataclasses.dataclass(frozen=True)
class WorkloadSpec:
    """Parameters of a workload. Names and meanings are those of `vllm bench serve`, but for the last.

    Attributes:
        num_prompts: Requests.
        random_input_len: Tokens of a prompt.
        random_output_len: Tokens of an output.
        random_range_ratio: Lengths are uniform from (1 - ratio) to (1 + ratio) times these.
        request_rate: Mean arrivals a second; inf sends all at once.
        burstiness: Shape of the gamma distribution of the gaps between arrivals. 1 is a Poisson process, less is burstier.
        lora_assignment: "random" or "round-robin".
        seed: Seed of all draws.
        lora_zipf_exponent: With "random", the share of the k-th adapter is proportional to k ** -exponent. 0: equal shares.
    """

    num_prompts: int = 1000
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    request_rate: float = math.inf
    burstiness: float = 1.0
    lora_assignment: str = "random"
    seed: int = 0
    lora_zipf_exponent: float = 0.0

    def __post_init__(self) -> None:
        for field in ("num_prompts", "random_input_len", "random_output_len"):
            require_field(self, field, getattr(self, field) >= 1, "1 or more")
        require_field(self, "random_range_ratio", 0 <= self.random_range_ratio < 1, "0 or more, below 1")
        require_field(self, "request_rate", self.request_rate > 0, "above 0 requests a second; inf sends all at once")
        require_field(self, "burstiness", 0 < self.burstiness < math.inf, "above 0")
        require_field(self, "lora_assignment", self.lora_assignment in ASSIGNMENTS, ", ".join(ASSIGNMENTS))
        require_field(self, "seed", self.seed >= 0, "0 or more")
        require_field(self, "lora_zipf_exponent", 0 <= self.lora_zipf_exponent < math.inf, "0 or more")
        is_random = self.lora_assignment == "random" or self.lora_zipf_exponent == 0
        require_field(self, "lora_zipf_exponent", is_random, "0 where lora_assignment is 'round-robin'")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        prompts: Token ids or text.
        input_lens: Tokens of each prompt; those of a text may differ on the server.
        output_lens: Tokens that each request asks for.
        arrival_s: Seconds from the start.
        models: Model or adapter that each request names.
    """

    prompts: Sequence[Sequence[int] | str]
    input_lens: Sequence[int]
    output_lens: Sequence[int]
    arrival_s: Sequence[float]
    models: Sequence[str]


def draw(spec: WorkloadSpec, models: Sequence[str], tokenizer: tokenizers.Tokenizer | None, as_text: bool) -> Workload:
    """Draw a workload; the same arguments give the same one.

    Args:
        spec: Its parameters.
        models: Models that requests name, the most popular first.
        tokenizer: Tokenizer of the model, for prompts that are its random tokens as text.
        as_text: Make prompts of text where there is no tokenizer too. Their lengths in tokens are estimates.
    """
    length_rng, prompt_rng, arrival_rng, model_rng = np.random.default_rng(spec.seed).spawn(4)
    input_lens = _lengths(length_rng, spec.random_input_len, spec)
    output_lens = _lengths(length_rng, spec.random_output_len, spec)
    if tokenizer is not None:
        prompts: list[Sequence[int] | str] = [_text(prompt_rng, n, tokenizer) for n in input_lens]
    elif as_text:
        prompts = [" ".join(prompt_rng.choice(WORDS, n)) for n in input_lens]
    else:
        prompts = [prompt_rng.integers(*TOKEN_IDS, n).tolist() for n in input_lens]
    names = [models[i] for i in _choices(model_rng, len(models), spec)]
    return Workload(prompts, input_lens, output_lens, _arrivals(arrival_rng, spec), names)


def load_tokenizer(source: str) -> tokenizers.Tokenizer:
    """Load the tokenizer of a directory, or of a hub id. Raises ValueError."""
    import tokenizers

    file = Path(source) / "tokenizer.json"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        return tokenizers.Tokenizer.from_pretrained(source)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"tokenizer is {source!r}; allowed: a directory with tokenizer.json, or a hub id ({error})") from error


def _lengths(rng: np.random.Generator, mean: int, spec: WorkloadSpec) -> list[int]:
    least, most = (max(1, round(mean * (1 + sign * spec.random_range_ratio))) for sign in (-1, 1))
    lengths: list[int] = rng.integers(least, most + 1, spec.num_prompts).tolist()
    return lengths


def _text(rng: np.random.Generator, length: int, tokenizer: tokenizers.Tokenizer) -> str:
    """Text of random tokens. Encoded again it may be more or fewer tokens; more are cut."""
    ids = rng.integers(0, tokenizer.get_vocab_size(), length).tolist()
    text = tokenizer.decode(ids)
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:length]))


def _arrivals(rng: np.random.Generator, spec: WorkloadSpec) -> list[float]:
    """Arrival times whose gaps are scaled so that the mean rate is exact."""
    if math.isinf(spec.request_rate):
        return [0.0] * spec.num_prompts
    gaps = rng.gamma(spec.burstiness, 1.0, spec.num_prompts)
    times: list[float] = (np.cumsum(gaps) * (spec.num_prompts / spec.request_rate / gaps.sum())).tolist()
    return times


def _choices(rng: np.random.Generator, count: int, spec: WorkloadSpec) -> list[int]:
    if spec.lora_assignment == "round-robin":
        return [i % count for i in range(spec.num_prompts)]
    shares = np.arange(1.0, count + 1) ** -spec.lora_zipf_exponent
    choices: list[int] = rng.choice(count, spec.num_prompts, p=shares / shares.sum()).tolist()
    return choices
