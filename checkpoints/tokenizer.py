"""Text to token ids and back, by the `tokenizers` library; chat templates by a sandboxed jinja2."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chameleon_jax.checkpoints.detokenizer import DetokenizerStream, TokenBytes


class Tokenizer:
    """A tokenizer with its special ids and chat template.

    Args:
        settings: what `tokenizer_config.json` says (bos_token, eos_token, chat_template, ...).

    Attributes:
        token_bytes: bytes that each token adds to a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_token_ids: Sequence[int] = ()):
        self.backend = backend
        self.token_bytes = TokenBytes(backend)
        self.settings = dict(settings)
        self.bos_token_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])]))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters of a text that one token may stand for, at most: what normalisation takes away not counted."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> DetokenizerStream:
        return DetokenizerStream(self.token_bytes, skip_special_tokens, prompt_token_ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model was trained on.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not template:
            raise ValueError("the tokenizer has no chat_template")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        special = {k: _text(v) for k, v in self.settings.items() if k.endswith("_token") and v is not None}
        try:
            return environment.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special
            )
        except Exception as error:  # a template is a program: on messages it does not expect it may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer | None:
        """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; None where there is no tokenizer.

        Raises:
            ValueError: one of the files is broken; names it.
        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            return None
        settings_file, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        try:
            settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{settings_file} is not JSON: {error}") from error
        if template.is_file():
            settings["chat_template"] = template.read_text()
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{file} cannot be read: {error}") from error
        return cls(backend, settings, eos_token_ids)

    def save(self, directory: Path) -> None:
        """Writes what `from_directory` and transformers' AutoTokenizer read."""
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))

    def _id(self, field: str) -> int | None:
        token = self.settings.get(field)
        return None if token is None else self.backend.token_to_id(_text(token))


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
