"""Tokenizers that GGUF files describe: SentencePiece's BPE and byte-level BPE, as `tokenizers` of Hugging Face."""

from __future__ import annotations

from collections import Counter

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from chameleon_jax.checkpoints.gguf_file import GgufFile
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.checks import require

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # token types
_END_TOKENS = (
    "</s>",
    "<EOT>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
)
"""Texts of special tokens at which llama.cpp ends a generation, whether or not a field names them."""
_SPACE = "▁"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "exaone4", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_LLAMA3.replace("{1,3}", ""),)),
    "tekken": (_TEKKEN,),
}
"""Patterns that split a text into words, one after the other, for each `tokenizer.ggml.pre`."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "tekken")
"""Kinds in which a word that is a token needs no merges, and a text begins with the BOS token unless a field denies it."""


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """Make the tokenizer that a file describes.

    Raises:
        ValueError: A field is missing, has another value, or asks for a tokenizer of another kind. The message names it.
    """
    kind = file.field("tokenizer.ggml.model", str)
    hint = "Serve the model from a Hugging Face directory, which has a tokenizer.json"
    require(kind in ("llama", "gpt2"), "tokenizer.ggml.model", kind, f"llama (SentencePiece), gpt2 (byte-level BPE). {hint}")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(file.list_field("tokenizer.ggml.tokens", str))]
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"tokenizer.ggml.tokens has {twice[0]!r} twice")
    types = file.list_field("tokenizer.ggml.token_type", int, len(tokens), [_NORMAL] * len(tokens))
    special = _special_tokens(file, tokens, {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {})
    if kind == "llama":
        backend, add_bos = _sentencepiece(file, tokens, types, special.get("unknown")), True
    else:
        backend, add_bos = _byte_level(file, tokens)
    ends = _end_tokens(tokens, types, special)
    _add_tokens(backend, tokens, types, ends)
    _add_template(file, backend, special, add_bos)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    settings = {f"{names[field]}_token": token for field, token in special.items() if field in names}
    if template := file.field("tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    return Tokenizer(backend, settings, [tokens.index(token) for token in ends], "tokenizer.chat_template")


def _special_tokens(file: GgufFile, tokens: list[str], defaults: dict[str, int]) -> dict[str, str]:
    """Read the tokens of the fields `tokenizer.ggml.NAME_token_id`, by name."""
    special = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        field = f"tokenizer.ggml.{name}_token_id"
        index = file.field(field, int, defaults.get(name, -1))
        require(index < len(tokens), field, index, f"below {len(tokens)}, the number of tokens")
        if index >= 0:
            special[name] = tokens[index]
    return special


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int], unknown: str | None) -> tokenizers.Tokenizer:
    """Make SentencePiece's BPE: two neighbours that form the token of the highest score are merged, first the leftmost."""
    scores = file.list_field("tokenizer.ggml.scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(tokens, types, scores)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    add_space = file.field("tokenizer.ggml.add_space_prefix", bool, True)
    prepend, strip = ([normalizers.Prepend(_SPACE)], [decoders.Strip(" ", 1, 0)]) if add_space else ([], [])
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """List the pairs of tokens that form a token, those of high scores first."""
    known = set(tokens)
    merges: list[tuple[float, int, str]] = []
    formed: dict[float, str] = {}
    for token, kind, score in zip(tokens, types, scores):
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known]
        if not cuts or kind not in (_NORMAL, _UNUSED):
            continue
        other = formed.setdefault(score, token)
        if other != token and len({*other, *token}) > 1:
            # the leftmost of the two is merged first, which no order of pairs expresses. Real files have equal scores for
            # runs of spaces, which merge alike if the longest pair comes first
            raise ValueError(f"tokenizer.ggml.scores are {score} for {other!r} and {token!r}; allowed: different ones")
        merges += [(-score, -cut, token) for cut in cuts]
    return [(token[:-cut], token[-cut:]) for _, cut, token in sorted(merges)]


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """Make the byte-level BPE of GPT-2, and say whether its kind of texts begins with the BOS token."""
    pre = file.field("tokenizer.ggml.pre", str, "default")
    require(pre in _SPLITS, "tokenizer.ggml.pre", pre, ", ".join(_SPLITS))
    pairs = file.list_field("tokenizer.ggml.merges", str)
    broken = next((pair for pair in pairs if pair.count(" ") != 1), None)
    require(broken is None, "a merge of tokenizer.ggml.merges", broken, "two tokens with a space between them")
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in pairs)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"tokenizer.ggml.merges: {error}") from error
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, encode])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _WHOLE_WORDS


def _end_tokens(tokens: list[str], types: list[int], special: dict[str, str]) -> list[str]:
    """List the tokens that end a generation: the end of a text, of a turn, of a message to a tool."""
    named = [special[name] for name in ("eos", "eot", "eom") if name in special]
    known = {token for token, kind in zip(tokens, types) if kind in (_CONTROL, _USER_DEFINED)}
    return list(dict.fromkeys([*named, *(token for token in _END_TOKENS if token in known)]))


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int], ends: list[str]) -> None:
    """Mark the tokens that are found in a text before it is split, with those that a decoded text leaves out."""
    kinds = dict(zip(tokens, types)) | dict.fromkeys(ends, _CONTROL)
    special = [token for token, kind in kinds.items() if kind in (_CONTROL, _UNKNOWN)]
    user_defined = [token for token, kind in kinds.items() if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in user_defined])


def _add_template(file: GgufFile, backend: tokenizers.Tokenizer, special: dict[str, str], add_bos: bool) -> None:
    """Put the BOS and EOS token around texts where a field, or the kind of the tokenizer, says so."""
    around = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        field = f"tokenizer.ggml.add_{name}_token"
        add = file.field(field, bool, default)
        require(not add or name in special, field, add, f"false, since there is no field tokenizer.ggml.{name}_token_id")
        around[name] = [special[name]] if add else []
    if parts := around["bos"] + around["eos"]:
        ids = {token: backend.token_to_id(token) for token in parts}
        single = [*around["bos"], "$A", *around["eos"]]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
