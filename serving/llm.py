"""Python API for batches: `LLM(model).generate(prompts, params, lora_request=...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from chameleon_jax.checkpoints.chat_template import ChatTemplate, special_tokens
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.checks import require
from chameleon_jax.config import EngineSettings
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import RequestOutput
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRAMix, LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.open_engine import compile_progress, open_engine
from chameleon_jax.serving.prompt_progress import PromptProgress, UseTqdm
from chameleon_jax.serving.prompts import Prompt, tokens_of
from chameleon_jax.serving.updates import logprobs_of, make_output, prompt_logprobs_of

Conversation = Sequence[Mapping[str, Any]]
"""Messages in OpenAI's form: each has a role, and content as text or as parts of text."""


class LLM:
    """A model and its adapters, served to one caller.

    Args:
        model: Name of a preset, a GGUF file, a Hugging Face or Orbax directory, or a hub id. Or an engine that is built, which
            `close` leaves open.
        progress: Told how many programs are compiled.
        settings: Fields of `EngineConfig`.

    Raises:
        ValueError: The model cannot be served or a setting is wrong; names it, and the nearest name to an unknown one.
    """

    def __init__(
        self,
        model: str | LLMEngine,
        *,
        progress: Callable[[int, int], None] = compile_progress,
        **settings: Unpack[EngineSettings],
    ):
        self.engine, self._owns_engine = open_engine(model, settings, progress)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End background threads and remove temporary files."""
        if self._owns_engine:
            self.engine.close()

    def get_tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. Raises ValueError where it has none (dummy weights)."""
        if self.engine.tokenizer is None:
            raise ValueError("the model has no tokenizer (load_format='dummy'): give prompts as token ids")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json."""
        return self.engine.sampling_defaults.params()

    def add_lora(
        self,
        name: str,
        path: str | Path | None = None,
        pinned: bool | None = None,
        *,
        weights: Any = None,
        peft_config: Any = None,
    ) -> None:
        """Read an adapter ahead of the first request for it, or anew, or take one from memory.

        Args:
            name: A new name, or one that gets new content.
            path: Directory or URL of the adapter.
            pinned: Whether the name keeps it in the pool. None keeps the name's pin; a new name has none.
            weights: The adapter in memory, in the place of `path`; see `LLMEngine.add_lora`.
            peft_config: Settings of `weights`: a LoraConfig of PEFT, or a mapping with its fields, lora_alpha at least.

        Raises:
            ValueError: The adapter cannot be served; says why. Nothing has changed then.
        """
        self.engine.add_lora(name, path, pinned, weights=weights, peft_config=peft_config)

    def remove_lora(self, name: str) -> None:
        """Forget a name. Requests that came with it finish; then its memory is free. Raises KeyError."""
        self.engine.remove_lora(name)

    def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in the pool once it is there, or stop to. Raises ValueError or KeyError."""
        self.engine.pin_lora(name, pinned)

    def list_loras(self) -> list[str]:
        """Names of all adapters, sorted."""
        return self.engine.list_loras()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts. `sampling_params`, `lora_request` and `priority` are one for all prompts, or one for each.

        Args:
            prompts: One prompt or several: text, token ids, or `{"prompt_token_ids": [...]}`.
            sampling_params: None takes the model's defaults, with max_tokens up to the room behind the prompt.
            lora_request: Adapters; None is the base model.
            use_tqdm: True shows a progress bar where stderr is a terminal, and in notebooks. A function, called as `tqdm.tqdm`
                is, makes the bar wherever it runs: `use_tqdm=tqdm.tqdm` shows it in a log too, as vLLM does.
            priority: Classes, signed 64-bit integers; None is 0. Lower ones start first.

        Raises:
            ValueError: A prompt or parameter is wrong. No prompt was run then.
            KeyError: No adapter of that name is registered. No prompt was run then.
        """
        many = _as_list(prompts)
        params = _one_each(sampling_params, len(many), "sampling_params")
        loras = _one_each(lora_request, len(many), "lora_request")
        priorities = _one_each(0 if priority is None else priority, len(many), "priority")
        requests: list[Request] = []
        read: set[LoRARequest | None] = set()
        try:
            for prompt, param, lora, own_priority in zip(many, params, loras, priorities):
                valid = isinstance(lora, LoRARequest | LoRAMix | None)
                require(valid, "lora_request", lora, "LoRARequest, LoRAMix or None")
                known = lora if lora is None or lora not in read else lora.known()
                token_ids = tokens_of(prompt, self.engine.tokenizer)
                if param is None:
                    param = self.get_default_sampling_params().fit(len(token_ids), self.engine.max_model_len)
                requests.append(self.engine.submit(token_ids, param, known, priority=own_priority))
                read.add(lora)
            with PromptProgress(requests, use_tqdm) as progress:
                while self.engine.loop.has_unfinished:
                    progress.update(self.engine.loop.step())
        except BaseException:
            for request in requests:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self.engine.loop.abort(request.request_id)
            raise
        return [self._output(*job) for job in zip(requests, many, loras)]

    def _output(self, request: Request, prompt: Prompt, lora: LoRARequest | None) -> RequestOutput:
        logprobs = logprobs_of(request, 0, len(request.output_token_ids), self.engine.tokenizer)
        of_prompt = prompt_logprobs_of(request, self.engine.tokenizer)
        return make_output(OutputSnapshot.of(request), prompt if isinstance(prompt, str) else None, lora, logprobs, of_prompt)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        Args:
            messages: Messages of one conversation, or of each of several.
            sampling_params: See `generate`.
            lora_request: See `generate`.
            use_tqdm: See `generate`.
            chat_template: Template to use instead of the model's, as Jinja text.
            add_generation_prompt: End the prompt with the start of the assistant's turn.
            continue_final_message: Continue the text of the last message. Requires `add_generation_prompt` to be False.
            tools: Functions that the model may call, in OpenAI's form, for the template. Calls come back as the text of the
                answer.
            chat_template_kwargs: Further variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: The template refuses a conversation, or as for `generate`.
            KeyError: As for `generate`.
        """
        require(not (continue_final_message and add_generation_prompt), "add_generation_prompt", True, "False, to continue")
        tokenizer = self.get_tokenizer()
        template = tokenizer.chat_template
        if chat_template is not None:
            template = ChatTemplate(chat_template, special_tokens(tokenizer.settings))
        variables = {**({} if tools is None else {"tools": list(tools)}), **(chat_template_kwargs or {})}
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for conversation in conversations:
            plain = [_with_text(message) for message in conversation]  # type: ignore[arg-type]
            text = template.render(plain, add_generation_prompt, continue_final_message, variables)
            prompts.append({"prompt_token_ids": tokens_of(text, tokenizer, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, lora_request, use_tqdm=use_tqdm)


def _with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join the parts of a message's content, as templates read text. Raises ValueError for a part without text."""
    parts = message.get("content")
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return message
    for part in parts:
        require(isinstance(part, Mapping) and isinstance(part.get("text"), str), "content", part, "text, or parts with text")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(value: Any, count: int, field: str) -> list[Any]:
    if value is None or isinstance(value, SamplingParams | LoRARequest | int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{field} has {len(value)} entries; allowed: one, or one for each of the {count} prompts")
    return list(value)
