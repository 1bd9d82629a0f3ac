"""Tiny tokenizers and models for the checkpoint tests."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from chameleon_jax.checkpoints.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # one character for each of the 256 bytes
BYTE_TOKENS = [*SPECIAL, *ALPHABET, "he", "ll", "Ġhe"]
BYTE_MERGES = [("h", "e"), ("l", "l"), ("Ġ", "he")]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
TEXTS = ["", "hello hell", "  two spaces\n\n12 345", "Überfluß", "你好，世界", "👩‍👩‍👧 and 🏳️‍🌈", "a\u0000b\ufffdc"]


def byte_level() -> Tokenizer:
    """Byte-level BPE, as SmolLM2 and Llama 3 have: a character outside ASCII is several tokens."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(BYTE_TOKENS)}, merges=BYTE_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return Tokenizer(backend, SETTINGS)


def byte_fallback() -> Tokenizer:
    """BPE with byte tokens and a stripped leading space, as Llama 1 and 2 have."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "\ufffd"]
    vocab = {t: i for i, t in enumerate([*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "h")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return Tokenizer(backend, SETTINGS)
