"""Token ids of a model: those that a request may name, those that end it, and grammars over them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.sampling_params import MAX_STOP_IDS, SamplingParams

if TYPE_CHECKING:
    from chameleon_jax.structured_outputs import Grammars


class ModelVocabulary:
    """Token ids that a model reads and draws.

    Args:
        config: Shape of the model.
        tokenizer: Its tokenizer; None where it has none.
    """

    def __init__(self, config: LlamaConfig, tokenizer: Tokenizer | None):
        self.size = config.vocab_size
        self._tokenizer = tokenizer
        self._eos = (*config.eos_token_ids, *(() if tokenizer is None else tokenizer.eos_token_ids))

    def check(self, field: str, token_ids: Iterable[int]) -> None:
        """Check that the model has every id. Raises ValueError with the first other one.

        Args:
            field: Name of the ids, for the error.
            token_ids: The ids.
        """
        for t in token_ids:
            if not isinstance(t, int | np.integer) or not 0 <= t < self.size:
                raise ValueError(f"{field}: token id {t!r} is out of range; allowed: 0 to {self.size - 1}")

    def check_params(self, params: SamplingParams) -> None:
        """Check every token id of sampling parameters. Raises ValueError."""
        for field in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            self.check(field, getattr(params, field) or ())

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end a request: its own, and the model's unless it ignores them. Raises ValueError for too many."""
        stop_ids = frozenset((*(() if params.ignore_eos else self._eos), *params.stop_token_ids))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids and the model's own are {len(stop_ids)} ids; allowed: {MAX_STOP_IDS} together")
        return stop_ids

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Grammars for the model's tokenizer; made at the first use, in half a second. Raises InvalidGrammar without one."""
        # here, since other requests are served without the package
        from chameleon_jax.structured_outputs import Grammars, Vocabulary

        if self._tokenizer is None:
            raise InvalidGrammar("the model has no tokenizer (load_format='dummy')")
        ids, tokens = range(self.size), self._tokenizer.token_bytes
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
        special = [i for i in ids if i in tokens.special_ids]
        vocabulary = Vocabulary([tokens.inside(i) for i in ids], special, encode)
        return Grammars(vocabulary, sorted(self.stop_ids(SamplingParams())))
