"""Token ids of a model, and work on them that is done once."""

from __future__ import annotations

import threading
import time

import pytest

from chameleon_jax.serving import model_vocabulary
from chameleon_jax.serving.http.requests import CompletionRequest
from chameleon_jax.serving.model_vocabulary import ModelVocabulary
from tests import reference_models as reference

CONFIG = reference.CONFIGS["gqa"]


class CountedId(int):
    """Token id that counts its comparisons."""

    looks = 0

    def __ge__(self, other: int) -> bool:
        CountedId.looks += 1
        return super().__ge__(other)


def test_allowed_ids_are_read_once_for_all_choices(monkeypatch):
    monkeypatch.setattr(CountedId, "looks", 0)
    vocabulary = ModelVocabulary(CONFIG, None)
    asked = CompletionRequest(prompt="x", n=8, seed=1, allowed_token_ids=[1])
    asked.allowed_token_ids = [CountedId(i) for i in range(40, 60)]
    choices = asked.sampling_params(None, None, 8, {})
    masks = [vocabulary.mask(choice.allowed_token_ids) for choice in choices]
    assert (
        [choice.seed for choice in choices] == list(range(1, 9))
        and CountedId.looks == 20
        and all(mask is masks[0] for mask in masks)
    )
    assert [i for i in range(CONFIG.vocab_size) if masks[0][i // 32] >> i % 32 & 1] == list(range(40, 60))


def test_other_allowed_ids_have_another_mask_and_wrong_ones_are_refused_each_time():
    vocabulary, wrong = ModelVocabulary(CONFIG, None), (1, CONFIG.vocab_size)
    assert vocabulary.mask(None) is None
    assert [list(vocabulary.mask((i,))).index(1 << i) for i in (3, 5, 3)] == [0] * 3
    for _ in range(2):
        with pytest.raises(ValueError, match=f"allowed_token_ids: token id {CONFIG.vocab_size} is out of range"):
            vocabulary.mask(wrong)


def test_grammars_are_made_once_for_threads_that_want_them_at_once(monkeypatch):
    vocabulary, made, found = ModelVocabulary(CONFIG, None), [], []

    def make(_: ModelVocabulary) -> object:
        made.append(object())
        time.sleep(0.05)
        return made[-1]

    monkeypatch.setattr(model_vocabulary.ModelVocabulary, "_make_grammars", make)
    threads = [threading.Thread(target=lambda: found.append(vocabulary.grammars)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == made * 4
