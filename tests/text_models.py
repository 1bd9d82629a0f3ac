"""A tiny Llama with the tokenizers that Llama-shaped models have: a word's space is part of its first token in all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests import reference_models as reference

CONFIG = dataclasses.replace(reference.CONFIGS["mha"], vocab_size=512)
PROMPT = "The capital of France is"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
}
WORDS = ["The", "capital", "of", "France", "is", "with", "Paris", "a", "city"]
LETTERS = "abcdefghijklmnopqrstuvwxyzACFTP.,!?é"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def llama2() -> Tokenizer:
    """Llama 1 and 2, Mistral, TinyLlama: a mark is put before the text, and the decoder takes its space away again."""
    backend = _byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(backend)


def metaspace(prepend_scheme: str) -> Tokenizer:
    """Newer files of the same models: the pre-tokenizer puts the mark there ("always" or "first")."""
    backend = _byte_fallback()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=prepend_scheme, split=False)]
    )
    return _with_specials(backend)


def gemma() -> Tokenizer:
    """No mark is put before the text, and none is taken away."""
    backend = _byte_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_specials(backend)


def byte_level() -> Tokenizer:
    """GPT-2 and Llama 3: every token is bytes, some of them of parts of characters and more."""
    backend = tokenizers.Tokenizer(_bpe([*SPECIAL, *ALPHABET], [*(f"Ġ{word}" for word in WORDS), "ĠâĤ", "Ã©"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("naïve"), AddedToken("two words"), AddedToken("日")])  # no bytes in GPT-2's alphabet
    return _with_specials(backend)


def save_model(directory: Path, tokenizer: Tokenizer) -> Path:
    """In transformers' layout. Much of what it writes is words: single bytes are unlikely, ids without a token more so."""
    checkpoint = reference.checkpoint(CONFIG)
    tensors = dict(checkpoint.tensors)
    head = tensors["lm_head.weight"].copy()
    for i in range(CONFIG.vocab_size):
        token = tokenizer.backend.id_to_token(i)
        head[i] *= 0.0 if token is None else 0.6 if token in BYTES or token in ALPHABET else 1.0
    tensors["lm_head.weight"] = head
    huggingface.save(dataclasses.replace(checkpoint, tensors=tensors), directory)
    tokenizer.save(directory)
    return directory


def written(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The part of the whole text that the output adds, as the library decodes it: the model wrote one text, not two."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens) for ids in (prompt, [*prompt, *output]))
    assert whole.startswith(before)
    return whole[len(before) :]


def _byte_fallback() -> tokenizers.Tokenizer:
    bpe = _bpe([*SPECIAL, *BYTES, "▁", *LETTERS, "\ufffd", "▁▁"], [*(f"▁{word}" for word in WORDS), "with"])
    bpe.byte_fallback, bpe.unk_token = True, "<unk>"
    return tokenizers.Tokenizer(bpe)


def _bpe(tokens: list[str], words: list[str]) -> models.BPE:
    """Words are merged letter by letter."""
    begun = dict.fromkeys(word[:n] for word in words for n in range(2, len(word) + 1))
    vocab = {token: i for i, token in enumerate(dict.fromkeys(itertools.chain(tokens, begun)))}
    assert len(vocab) <= CONFIG.vocab_size
    return models.BPE(vocab=vocab, merges=[(word[:-1], word[-1]) for word in begun])


def _with_specials(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, SETTINGS)


VARIANTS = {
    "llama2": llama2(),
    "metaspace-always": metaspace("always"),
    "metaspace-first": metaspace("first"),
    "gemma": gemma(),
    "byte-level": byte_level(),
}
