"""Text to token ids and back, with the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from chameleon_jax.checkpoints.chat_template import ChatTemplate, read_chat_template, special_tokens, token_text
from chameleon_jax.checkpoints.detokenizer import DetokenizerStream, TokenBytes
from chameleon_jax.checkpoints.json_file import read_json


class Tokenizer:
    """A tokenizer with its special ids and chat template.

    Args:
        backend: tokenizer of the library.
        settings: content of `tokenizer_config.json` (bos_token, eos_token, chat_template, ...).
        eos_token_ids: ids that end a sequence, beside the eos_token of the settings.
        template_place: file or field of the chat template, for errors.

    Attributes:
        token_bytes: bytes that each token adds to a text.
        eos_token_ids: ids that end a sequence.
        vocab_size: ids of the tokenizer, added tokens among them.
        longest_token: most characters of a text that one token stands for, not counting those that normalisation removes.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        eos_token_ids: Sequence[int] = (),
        template_place: str = "chat_template",
    ):
        self.backend = backend
        self.token_bytes = TokenBytes(backend)
        self.settings = dict(settings)
        self.chat_template = self.make_chat_template(settings.get("chat_template"), template_place)
        self.bos_token_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])]))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens around it unless told otherwise."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens unless told otherwise."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> DetokenizerStream:
        """Make a stream that turns the tokens behind a prompt into text, one at a time."""
        return DetokenizerStream(self.token_bytes, skip_special_tokens, prompt_token_ids)

    @property
    def end_tokens(self) -> list[str]:
        """Texts of the special tokens that end a sequence."""
        special = self.token_bytes.special_ids
        return [self.token(i) for i in self.eos_token_ids if i in special]

    def token(self, token_id: int) -> str:
        """Name of a token in the vocabulary; empty for an id without a token."""
        return self.backend.id_to_token(token_id) or ""

    def has_token(self, text: str) -> bool:
        """Whether a text is a token of its own."""
        return self.backend.token_to_id(text) is not None

    def is_special(self, text: str) -> bool:
        """Whether a text is a token that texts may leave out."""
        return self.backend.token_to_id(text) in self.token_bytes.special_ids

    def make_chat_template(self, source: Any, place: str) -> ChatTemplate:
        """Make a chat template that sees the special tokens. Args: place: file or field of the source, for errors."""
        return ChatTemplate(source, special_tokens(self.settings), place)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation as the text the model was trained on.

        Args:
            messages: messages of the conversation, each with a role and content.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end where the last message's text ends.
            variables: further variables of the template.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        return self.chat_template.render(messages, add_generation_prompt, continue_final_message, variables)

    @classmethod
    def from_directory(cls, directory: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer | None:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template; None where there is no tokenizer.

        Raises:
            ValueError: one of the files is broken; names it.
        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            return None
        settings = read_json(directory / "tokenizer_config.json", missing_ok=True)
        if "added_tokens_decoder" not in settings:  # older checkpoints keep their special tokens in another file
            settings |= read_json(directory / "special_tokens_map.json", missing_ok=True)
        settings["chat_template"], place = read_chat_template(directory, settings)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{file} cannot be read: {error}") from error
        backend.no_truncation()  # training scripts leave both in the file, which would cut prompts silently
        backend.no_padding()
        return cls(backend, settings, eos_token_ids, place)

    def save(self, directory: Path) -> None:
        """Write the files that `from_directory` and transformers' AutoTokenizer read."""
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

    def _id(self, field: str) -> int | None:
        token = token_text(self.settings.get(field))
        return None if token is None else self.backend.token_to_id(token)
