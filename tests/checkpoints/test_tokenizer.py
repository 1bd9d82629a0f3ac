from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests.checkpoints import samples

TOKENIZERS = {"byte_level": samples.byte_level(), "byte_fallback": samples.byte_fallback()}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def pieces(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.append(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("text", samples.TEXTS)
def test_decode_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", samples.TEXTS)
def test_stream_gives_whole_characters(tokenizer, text):
    out = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)


def test_stream_gives_ascii_at_once():
    assert pieces(TOKENIZERS["byte_level"], TOKENIZERS["byte_level"].encode("hello")) == ["he", "ll", "o", ""]


def test_stream_holds_half_a_character_until_flush():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a🏳")
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🏳", ""]
    assert pieces(tokenizer, ids[:-1]) == ["a", "", "", "", "\ufffd"]


def test_flush_gives_its_text_once():
    tokenizer = TOKENIZERS["byte_level"]
    stream = tokenizer.stream()
    stream.append(tokenizer.encode("é")[0])
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_pieces_of_any_ids_are_the_decoded_text(name, skip_special_tokens, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    text = "".join(pieces(tokenizer, ids, skip_special_tokens=skip_special_tokens))
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    if name == "byte_level" or "\ufffd" not in expected:  # byte fallback decodes a run of bytes whole or not at all
        assert text == expected


def test_special_ids(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert Tokenizer(tokenizer.backend, samples.SETTINGS, [7, 2]).eos_token_ids == (7, 2)
    assert Tokenizer(tokenizer.backend, {"eos_token": {"content": "</s>"}}).eos_token_ids == (2,)
    assert Tokenizer(tokenizer.backend, {}).bos_token_id is None


def test_chat_template(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES) == "<user>hi<assistant>"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<user>hi"


def test_directory_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path, [5])
    assert loaded is not None
    assert loaded.encode("hello 你") == tokenizer.encode("hello 你")
    assert loaded.eos_token_ids == (5, 2)
    assert loaded.apply_chat_template(MESSAGES) == "<user>hi<assistant>"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES) == "from the file"


def test_saved_settings_name_a_class_that_transformers_has(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_tokenizer_in_the_directory(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None


def test_truncation_and_padding_that_a_training_run_left_behind_are_not_used(tmp_path):
    backend = tokenizers.Tokenizer.from_str(samples.byte_level().backend.to_str())
    text = "hello " * 20
    ids = backend.encode(text).ids
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=len(ids) + 5)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
