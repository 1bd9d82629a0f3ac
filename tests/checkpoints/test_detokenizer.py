"""Texts token by token, and tokens as bytes, for every kind of tokenizer, against the library's own decoding of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.checkpoints.detokenizer import shown
from tests.properties import examples
from tests.text_models import PROMPT, SPECIAL, VARIANTS, written

TEXTS = [
    PROMPT,
    "with  two",
    " a",
    "café €é 日本 👩‍👩‍👧",
    "€",
    "[INST] a [/INST] with",
    "with</s> a",
    "a\ufffdb",
    "two words 日",
]
IDS = st.lists(st.integers(0, 345), max_size=10)  # ids that no token has among them


@pytest.fixture(params=VARIANTS)
def tokenizer(request):
    return VARIANTS[request.param]


def pieces(tokenizer, prompt, output, skip_special_tokens=True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens, prompt)
    return [*(stream.append(i) for i in output), stream.flush()]


def joined(tokenizer, prompt, output, skip_special_tokens=True) -> bytes:
    """Bytes of the output's tokens."""
    tokens = tokenizer.token_bytes
    left_out = tokens.left_out(skip_special_tokens)
    data, ids = b"", list(prompt)
    for i in output:
        find = tokens.inside if tokens.have_text(ids, left_out) else tokens.at_start
        data += b"" if i in left_out else find(i)
        ids.append(i)
    return data


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_text_cut_anywhere_is_its_prompt_and_its_continuation(tokenizer, text, skip_special_tokens):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens)
    for cut in range(len(ids) + 1):
        prompt, output = ids[:cut], ids[cut:]
        before = "".join(pieces(tokenizer, [], prompt, skip_special_tokens)[:-1])
        begun = tokenizer.stream(skip_special_tokens, prompt).pending
        after = pieces(tokenizer, prompt, output, skip_special_tokens)
        assert before + "".join(after) == whole
        assert after[-1] == ""
        assert (begun + joined(tokenizer, prompt, output, skip_special_tokens)).decode() == "".join(after)


@pytest.mark.parametrize("variant", VARIANTS)
@examples(200)
@given(prompt=IDS, output=IDS, skip_special_tokens=st.booleans())
def test_any_ids(variant, prompt, output, skip_special_tokens):
    tokenizer = VARIANTS[variant]
    text = "".join(pieces(tokenizer, prompt, output, skip_special_tokens))
    begun = tokenizer.stream(skip_special_tokens, prompt).pending
    assert (begun + joined(tokenizer, prompt, output, skip_special_tokens)).decode(errors="replace") == text
    if not any("\ufffd" in tokenizer.decode(ids, skip_special_tokens) for ids in (prompt, [*prompt, *output])):
        assert text == written(tokenizer, prompt, output, skip_special_tokens)


def test_a_word_keeps_its_space_behind_a_prompt_and_loses_it_at_the_start():
    llama2 = VARIANTS["llama2"]
    word = llama2.backend.token_to_id("▁with")
    assert pieces(llama2, llama2.encode(PROMPT), [word, word])[:2] == [" with", " with"]
    assert pieces(llama2, [1], [word, word])[:2] == ["with", " with"]  # nothing but specials before it
    assert pieces(llama2, [], [word])[0] == "with"
    assert pieces(llama2, [1], [word], skip_special_tokens=False)[0] == " with"  # <s> with
    instruction = [llama2.backend.token_to_id(token) for token in ("[INST]", "▁a", "[/INST]")]
    assert pieces(llama2, [1, *instruction], [word])[0] == " with"


def test_the_context_is_a_few_tokens_of_any_prompt():
    llama2 = VARIANTS["llama2"]
    read = []

    class Prompt(list):
        def __reversed__(self):
            for i in super().__reversed__():
                read.append(i)
                yield i

    word = llama2.backend.token_to_id("▁with")
    assert llama2.stream(prompt_token_ids=Prompt([word] * 100_000)).append(word) == " with"
    assert len(read) <= 4
    read.clear()
    assert llama2.stream(prompt_token_ids=Prompt([1] * 100_000)).append(word) == "with"
    assert len(read) <= 256


def test_tokens_stand_for_bytes():
    llama2, byte_level = VARIANTS["llama2"], VARIANTS["byte-level"]
    for tokenizer, token, data in (
        (llama2, "<0xE2>", b"\xe2"),
        (llama2, "<0x0A>", b"\n"),
        (llama2, "▁with", b" with"),
        (llama2, "\ufffd", "\ufffd".encode()),
        (llama2, "</s>", b"</s>"),
        (byte_level, "ĠâĤ", b" \xe2\x82"),
        (byte_level, "Ã©", "é".encode()),
        (byte_level, "¬", b"\xac"),
        (byte_level, "[/INST]", b"[/INST]"),
        (byte_level, "naïve", "naïve".encode()),
        (byte_level, "two words", b"two words"),
        (byte_level, "日", "日".encode()),
    ):
        assert tokenizer.token_bytes.inside(tokenizer.backend.token_to_id(token)) == data, token
    assert llama2.token_bytes.inside(500) == b""
    assert {VARIANTS["gemma"].backend.id_to_token(i) for i in VARIANTS["gemma"].token_bytes.special_ids} == set(SPECIAL)


def test_every_byte_has_a_token_of_its_own(tokenizer):
    shows = {}
    for i in range(tokenizer.vocab_size):
        shows.setdefault(tokenizer.token_bytes.inside(i), i)
    assert all(bytes([byte]) in shows for byte in range(256))
    assert len(set(map(shown, shows))) == len(shows)


@pytest.mark.parametrize(
    ("data", "text"), [(b" with", " with"), (b"\xe2\x82", r"bytes:\xe2\x82"), (b" \xe2", r"bytes: \xe2"), (b"", "")]
)
def test_tokens_are_shown_in_the_form_of_openai(data, text):
    assert shown(data) == text
