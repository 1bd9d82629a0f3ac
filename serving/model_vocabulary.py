"""Token ids of a model: those that a request may name, those that end it, and grammars over them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import InvalidGrammar, InvalidValue
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.ops.sampling import mask_of
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
        self._last_mask: tuple[Sequence[int], np.ndarray | None] = ((), None)
        self._making_grammars = threading.Lock()
        self._grammars: Grammars | None = None
        self._eos = (*config.eos_token_ids, *(() if tokenizer is None else tokenizer.eos_token_ids))

    def check(self, field: str, token_ids: Iterable[int]) -> None:
        """Check that the model has every id. Raises ValueError with the first other one.

        Args:
            field: Name of the ids, for the error.
            token_ids: The ids.
        """
        for t in token_ids:
            if not isinstance(t, int | np.integer) or not 0 <= t < self.size:
                raise InvalidValue(field, f"{field}: token id {t!r} is out of range; allowed: 0 to {self.size - 1}")

    def check_params(self, params: SamplingParams) -> None:
        """Check the token ids of sampling parameters, except those that `mask` checks. Raises ValueError."""
        for field in ("stop_token_ids", "logit_bias"):
            self.check(field, getattr(params, field) or ())

    def mask(self, allowed_token_ids: Sequence[int] | None) -> np.ndarray | None:
        """Bits of the ids that a request can draw; None where it can draw any. Raises ValueError for ids out of range.

        The choices of a request share one tuple, which may name most of the vocabulary: it is read for the first of them only.
        """
        if allowed_token_ids is None:
            return None
        last_ids, mask = self._last_mask
        if allowed_token_ids is not last_ids:
            self.check("allowed_token_ids", allowed_token_ids)
            mask = mask_of(allowed_token_ids, self.size)
            self._last_mask = allowed_token_ids, mask
        return mask

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end a request: its own, and the model's unless it ignores them. Raises ValueError for too many."""
        stop_ids = frozenset((*(() if params.ignore_eos else self._eos), *params.stop_token_ids))
        if len(stop_ids) > MAX_STOP_IDS:
            text = f"stop_token_ids and the model's own are {len(stop_ids)} ids; allowed: {MAX_STOP_IDS} together"
            raise InvalidValue("stop_token_ids", text)
        return stop_ids

    @property
    def grammars(self) -> Grammars:
        """Grammars for the model's tokenizer; made at the first use, in half a second. Raises InvalidGrammar without one."""
        with self._making_grammars:
            if self._grammars is None:
                self._grammars = self._make_grammars()
            return self._grammars

    def _make_grammars(self) -> Grammars:
        # here, since other requests are served without the package
        from chameleon_jax.structured_outputs import Grammars, Vocabulary

        if self._tokenizer is None:
            raise InvalidGrammar("the model has no tokenizer (load_format='dummy')")
        ids, tokens = range(self.size), self._tokenizer.token_bytes
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
        special = [i for i in ids if i in tokens.special_ids]
        vocabulary = Vocabulary([tokens.inside(i) for i in ids], special, encode)
        return Grammars(vocabulary, sorted(self.stop_ids(SamplingParams())))
