"""What a prompt is to the model, and that what is too long costs nothing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from chameleon_jax.checkpoints.loading import load_checkpoint
from chameleon_jax.serving.prompts import PromptReader, tokens_of


class Bytes:
    """As much of a tokenizer as is asked for: a token a byte."""

    longest_token = 1

    def __init__(self):
        self.threads: list[str] = []

    def encode(self, text, add_special_tokens=True):
        self.threads.append(threading.current_thread().name)
        return list(text.encode()) + [0] * add_special_tokens


@pytest.fixture
def reader():
    reader = PromptReader(Bytes(), 5000)
    yield reader
    reader.close()


def read(reader: PromptReader, prompt, *args):
    return asyncio.run(reader.read(prompt, *args))


def test_texts_and_ids(reader):
    assert read(reader, "ab") == read(reader, {"prompt": "ab"}) == [97, 98, 0]
    assert read(reader, "ab", False) == [97, 98]
    assert read(reader, [5, 6]) == read(reader, (5, 6)) == read(reader, {"prompt_token_ids": [5, 6]}) == [5, 6]


def test_long_texts_are_tokenised_in_a_thread(reader):
    assert len(read(reader, "x" * 4000)) == 4001
    assert [name.startswith("tokenizer") for name in reader._tokenizer.threads] == [True]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("x" * 5001, "5001 characters; allowed: 5000"),
        ({"text": "x"}, "keys"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "keys"),
    ],
)
def test_what_is_refused(reader, prompt, match):
    with pytest.raises(ValueError, match=match):
        read(reader, prompt)
    assert not reader._tokenizer.threads


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        tokens_of("x", None)
    assert tokens_of([1], None) == [1]


def test_lone_surrogates(text_model):
    with pytest.raises(ValueError, match="surrogate"):
        tokens_of("\ud800", load_checkpoint(str(text_model)).tokenizer)
