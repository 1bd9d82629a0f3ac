from __future__ import annotations

import itertools
import json
import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from chameleon_jax.checkpoints import gguf as gguf_checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests.checkpoints import samples
from tests.checkpoints.test_gguf import FIELDS, write


def load(folder, **fields) -> Tokenizer:
    tokenizer = gguf_checkpoint.load(write(folder / "m.gguf", **fields)).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", samples.TEXTS)
@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe"])
def test_tokenizer(pre, text, tmp_path):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer = load(tmp_path, **fields)
    assert tokenizer.encode(text) == samples.byte_level().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_template(tmp_path):
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.encode("<s>he</s>")[0] == 1 and tokenizer.decode(tokenizer.encode("<s>he</s>")) == "he"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"


def test_pre_tokenizers_split_numbers(tmp_path):
    tokens = [*samples.BYTE_TOKENS, "12", "123", "1234"]
    merges = [*FIELDS["tokenizer.ggml.merges"], "1 2", "12 3", "123 4"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": None}
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        fields |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        tokenizer = load(tmp_path, **fields)
        pieces[pre] = [tokens[i] for i in tokenizer.encode("1234")]
    assert pieces == {"gpt-2": ["1234"], "smollm": ["1", "2", "3", "4"], "llama-bpe": ["123", "4"]}


@pytest.mark.parametrize(
    ("pre", "add_bos", "first"), [("llama-bpe", None, 1), ("llama-bpe", False, 3), ("gpt-2", None, 3), ("gpt-2", True, 1)]
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(pre, add_bos, first, tmp_path):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos}
    tokenizer = load(tmp_path, **fields)
    ids = tokenizer.encode("!")
    assert ids[0] == first
    assert tokenizer.encode("!", add_special_tokens=False) == ids[-1:]


def test_end_of_turn_ends_too(tmp_path):
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", **{"tokenizer.ggml.eot_token_id": 5}))
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (2, 5)


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
def test_tokens_at_which_llama_cpp_ends_end_too(kind, tmp_path):
    tokens = [*samples.BYTE_TOKENS, "<|im_end|>", "<|eot_id|>"]
    types = [*FIELDS["tokenizer.ggml.token_type"], kind, 1]
    tokenizer = load(tmp_path, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    end = len(samples.BYTE_TOKENS)
    assert tokenizer.eos_token_ids == (2, end)
    assert tokenizer.encode("he<|im_end|>")[-1] == end and tokenizer.decode([end]) == ""


def test_user_defined_tokens_are_found_and_stay_in_the_text(tmp_path):
    tokens = [*samples.BYTE_TOKENS, "[TOOL]"]
    types = [*FIELDS["tokenizer.ggml.token_type"], 4]
    tokenizer = load(tmp_path, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    ids = tokenizer.encode("he[TOOL]he")
    assert ids[1] == len(samples.BYTE_TOKENS) and tokenizer.decode(ids) == "he[TOOL]he"


@pytest.mark.parametrize("kind", [2, 3], ids=["unknown", "control"])
def test_special_tokens_are_left_out_of_the_text(kind, tmp_path):
    types = [kind, *FIELDS["tokenizer.ggml.token_type"][1:]]
    tokenizer = load(tmp_path, **{"tokenizer.ggml.token_type": types})
    assert tokenizer.encode("he<unk>")[-1] == 0 and tokenizer.decode([0]) == ""


WORDS = {
    "default": ["a", "(", " b", ")!", "123", "45", "'", "s"],
    "gpt-2": ["a", "(", " b", ")!", "12345", "'s"],
    "smollm": ["a", "(", " b", ")!", "1", "2", "3", "4", "5", "'s"],
    "llama-bpe": ["a", "(", " b", ")!", "123", "45", "'s"],
    "smaug-bpe": ["a", "(", " b", ")!", "123", "45", "'s"],
    "qwen2": ["a", "(", " b", ")!", "1", "2", "3", "4", "5", "'s"],
    "tekken": ["a", "(", " b", ")!", "1", "2", "3", "4", "5", "'s"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_pre_tokenizers_split_words(pre, tmp_path):
    backend = load(tmp_path, **{"tokenizer.ggml.pre": pre}).backend

    def words(text: str) -> list[str]:
        return [word.replace("Ġ", " ") for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    assert words("a( b)!12345's") == WORDS[pre]
    assert words("HelloWorld") == (["Hello", "World"] if pre == "tekken" else ["HelloWorld"])
    assert words("x  y") == ["x", " ", " y"]


def test_file_without_a_pre_tokenizer_has_the_default_one(tmp_path):
    backend = load(tmp_path, **{"tokenizer.ggml.pre": None}).backend
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("1234")] == ["123", "4"]


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["abcd"]), ("smaug-bpe", ["a", "b", "c", "d"])])
def test_words_that_are_tokens_need_no_merges_in_llama_3(pre, pieces, tmp_path):
    tokens = [*samples.BYTE_TOKENS, "abcd"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": None, "tokenizer.ggml.pre": pre}
    tokenizer = load(tmp_path, **fields)
    assert [tokens[i] for i in tokenizer.encode("abcd", add_special_tokens=False)] == pieces


CORPUS = [
    "the heart of man is a deep well, and the hand of the man is weak",
    "banana bandana cabana abab aabb ababab aaaa aaaaaaaa bbbb",
    "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "über öl, déjà vu; naïve café 123 1234 2024",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS = ["▁" * length for length in (2, 3, 4, 5, 8)]


def trained() -> Tokenizer:
    """Tokenizer of Llama 2's kind, with the merges of a small corpus."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = samples.byte_fallback().backend.normalizer
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = [*samples.SPECIAL, *BYTES]
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = samples.byte_fallback()
    tokenizer.backend.model = models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return Tokenizer(tokenizer.backend, samples.SETTINGS)


HF = trained()
TOKENS = [*(HF.backend.id_to_token(i) for i in range(HF.vocab_size)), *RUNS]
LEARNT = ["".join(merge) for merge in json.loads(HF.backend.to_str())["model"]["merges"]]
SCORES = [-1.0 - LEARNT.index(token) if token in LEARNT else -1e9 if token in RUNS else 0.0 for token in TOKENS]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": None,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 259)],
}


def sentencepiece(text: str, prefix: bool = True) -> list[str]:
    """Tokens of a text by SentencePiece's algorithm: merge the pair of the highest score, the leftmost of several."""
    scores = dict(zip(TOKENS, SCORES))
    found: list[str] = []
    for part in re.split("(<unk>|<s>|</s>)", text):
        if part in samples.SPECIAL:
            found.append(part)
            continue
        pieces = list(("▁" if prefix and part else "") + part.replace(" ", "▁"))
        while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]:
            i = min(pairs)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        for piece in pieces:
            found += [piece] if piece in scores else [BYTES[byte] for byte in piece.encode()]
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[bool, Tokenizer]:
    """Tokenizers of files that put a space before a text, and that do not."""
    return {
        prefix: load(tmp_path_factory.mktemp("gguf"), **SENTENCEPIECE, **{"tokenizer.ggml.add_space_prefix": prefix})
        for prefix in (True, False)
    }


PARTS = st.sampled_from([*"aabbn th", "  ", "▁", "\n", "é", "ü", "日", "👩‍👧", "\0", "<s>", "</s>", "<unk>", "<0x0A>", *CORPUS])
RANDOM = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("prefix", [True, False])
@given(text=st.lists(PARTS | RANDOM, max_size=12).map("".join))
def test_sentencepiece_encodes_as_its_algorithm(prefix, loaded, text):
    tokenizer = loaded[prefix]
    ids = tokenizer.encode(text)
    assert [TOKENS[i] for i in ids] == ["<s>", *sentencepiece(text, prefix)]
    if not {"<unk>", "<s>", "</s>"} & {TOKENS[i] for i in ids[1:]}:
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.fixture(scope="module")
def without_runs(tmp_path_factory) -> Tokenizer:
    """Tokenizer of a file with the tokens of the tokenizer.json alone."""
    names = ("tokens", "scores", "token_type")
    fields = {f"tokenizer.ggml.{name}": SENTENCEPIECE[f"tokenizer.ggml.{name}"][: HF.vocab_size] for name in names}
    return load(tmp_path_factory.mktemp("gguf"), **(SENTENCEPIECE | fields))


@given(text=st.lists(PARTS | RANDOM, max_size=12).map("".join))
def test_sentencepiece_encodes_as_the_tokenizer_json(without_runs, text):
    assert without_runs.encode(text, add_special_tokens=False) == HF.encode(text, add_special_tokens=False)


@given(length=st.integers(1, 200))
def test_runs_of_spaces_with_equal_scores_merge_as_in_sentencepiece(loaded, length):
    ids = loaded[True].encode(" " * length, add_special_tokens=False)
    assert [TOKENS[i] for i in ids] == sentencepiece(" " * length)


def test_sentencepiece_stream_gives_the_text(loaded):
    text = "the man\n  é 日本 👩‍👧 ab"
    stream = loaded[True].stream()
    pieces = [*(stream.append(i) for i in loaded[True].encode(text)), stream.flush()]
    assert "".join(pieces) == text and len(pieces) > 8


def test_sentencepiece_has_special_tokens_without_fields_for_them(tmp_path):
    absent = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos", "unknown")}
    tokenizer = load(tmp_path, **SENTENCEPIECE, **absent)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("bos", "eos", "ids"), [(True, True, [1, "▁", 2]), (False, False, ["▁"]), (None, None, [1, "▁"]), (False, True, ["▁", 2])]
)
def test_bos_and_eos_are_added_where_the_file_says_so(bos, eos, ids, tmp_path):
    fields = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = load(tmp_path, **SENTENCEPIECE, **fields, **{"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode(" ") == [TOKENS.index(token) if isinstance(token, str) else token for token in ids]


def scores(**changed: float) -> list[float]:
    return [changed.get(token, score) for token, score in zip(TOKENS, SCORES)]


BYTE_LEVEL_REFUSALS = {
    "kind": ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; allowed: llama .*, gpt2"),
    "no kind": ({"model": None}, "no field tokenizer.ggml.model"),
    "pre": ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; allowed: default, gpt-2"),
    "merge": ({"merges": ["he"]}, "a merge of tokenizer.ggml.merges is 'he'"),
    "merge of no tokens": ({"merges": ["zz zz"]}, "tokenizer.ggml.merges: "),
    "no merges": ({"merges": None}, "no field tokenizer.ggml.merges"),
    "tokens": ({"tokens": 7}, "tokenizer.ggml.tokens is 7; allowed: a list, each text"),
    "numbers as tokens": ({"tokens": [7]}, r"tokenizer.ggml.tokens is \[7\]; allowed: a list, each text"),
    "token twice": ({"tokens": [*samples.BYTE_TOKENS[:-1], "he"]}, "tokenizer.ggml.tokens has 'he' twice"),
    "types": ({"token_type": [1, 1]}, "length of tokenizer.ggml.token_type is 2; allowed: 262, the number of tokens"),
    "bos": ({"bos_token_id": 999}, "bos_token_id is 999; allowed: below 262"),
    "flag": ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1; allowed: true or false"),
    "bos that is not there": ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token is True; allowed: false"),
    "eos that is not there": ({"add_eos_token": True, "eos_token_id": None}, "add_eos_token is True; allowed: false"),
    "template": ({"chat_template": 7}, "tokenizer.chat_template is 7; allowed: text"),
}
SENTENCEPIECE_REFUSALS = {
    "no scores": ({"scores": None}, "no field tokenizer.ggml.scores"),
    "scores": ({"scores": [1.0]}, f"length of tokenizer.ggml.scores is 1; allowed: {len(TOKENS)}"),
    "equal scores": ({"scores": scores(an=0.5, ab=0.5)}, "tokenizer.ggml.scores are 0.5 for 'an' and 'ab'"),
}


def refused(folder, fields: dict, base: dict, error: str) -> None:
    named = {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": value for name, value in fields.items()}
    path = write(folder / "m.gguf", **(base | named))
    with pytest.raises(ValueError, match=error):
        gguf_checkpoint.load(path)


@pytest.mark.parametrize("name", BYTE_LEVEL_REFUSALS)
def test_refusals(name, tmp_path):
    fields, error = BYTE_LEVEL_REFUSALS[name]
    refused(tmp_path, fields, {}, error)


@pytest.mark.parametrize("name", SENTENCEPIECE_REFUSALS)
def test_refusals_of_sentencepiece(name, tmp_path):
    fields, error = SENTENCEPIECE_REFUSALS[name]
    refused(tmp_path, fields, SENTENCEPIECE, error)
