"""`generate`: complete a prompt, or hold a conversation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.cli import options
from chameleon_jax.serving.cli.model_check import check_model
from chameleon_jax.serving.cli.options import console, errors, named_adapters, progress

if TYPE_CHECKING:
    from chameleon_jax.serving.llm import LLM


def generate(
    model: options.Model,
    prompt: Annotated[str | None, Option(help="Text to continue. With --chat, the user's message.")] = None,
    lora_modules: options.LoraModules = None,
    lora: Annotated[
        list[str] | None,
        Option(
            help="Adapter to answer with (default: each of --lora-modules, else the base model). Repeat to compare several."
        ),
    ] = None,
    chat: Annotated[
        bool, Option(help="Use the model's chat template. Without --prompt, hold a conversation, from a terminal or a pipe.")
    ] = False,
    max_tokens: Annotated[
        int | None, Option(help="Most output tokens (default: the model's own, else 128, or the room in a conversation).")
    ] = None,
    temperature: Annotated[float | None, Option(help="0 decodes greedily (default: the model's own, else 0).")] = None,
    top_p: Annotated[float | None, Option(help="Share of the probability mass to sample from.")] = None,
    top_k: Annotated[int | None, Option(help="Most likely tokens to sample from; 0 allows all.")] = None,
    min_p: Annotated[float | None, Option(help="Lowest probability to sample from, relative to the best token's.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the sampling (default: drawn by the engine).")] = None,
    generation_config: options.GenerationConfig = EngineConfig.generation_config,
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    system: options.SystemName = options.DEFAULT_SYSTEM,
) -> None:
    """Complete a prompt, or hold a conversation.

    Example: chameleon-jax generate smollm2-135m --prompt "What is the capital of France?" --chat

    In a conversation: /exit ends it, /reset forgets it, /adapter NAME answers with an adapter, /adapter with the base model.
    """
    fields = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given: dict[str, Any] = {name: value for name, value in (fields | {"seed": seed}).items() if value is not None}
    adapters = named_adapters(lora_modules)
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "enable_lora": bool(adapters)}
    settings |= {"system": system, "generation_config": generation_config, "compile_programs": "lazy"}
    settings |= {"dtype": dtype, "max_model_len": max_model_len, "enable_lora_extras": bool(adapters)}
    with errors():
        require(prompt is not None or chat, "prompt", prompt, "text, or --chat without a prompt for a conversation")
        require(prompt is not None or len(lora or ()) <= 1, "lora", lora, "one adapter in a conversation")
        for name in lora or ():
            require(name in adapters, "lora", name, ", ".join(adapters) or "an adapter of --lora-modules")
        SamplingParams(**given)
        EngineConfig.of(settings)
        check_model(model)
        with _open(model, adapters, settings) as llm:
            most = llm.engine.max_model_len if prompt is None else 128
            params = SamplingParams(**{"max_tokens": most, "temperature": 0.0, **llm.engine.sampling_defaults.values, **given})
            if prompt is None:
                from chameleon_jax.serving.cli.chat import Chat

                Chat(llm, params, lora[0] if lora else None).run()
            else:
                _complete(llm, prompt, chat, params, max_tokens is None, lora or [*adapters])


@contextlib.contextmanager
def _open(model: str, adapters: dict[str, str], settings: dict[str, Any]) -> Iterator[LLM]:
    from chameleon_jax.serving.llm import LLM

    with LLM(model, progress=progress, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        yield llm


def _complete(llm: LLM, prompt: str, chat: bool, params: SamplingParams, fit: bool, names: list[str]) -> None:
    """Print the completion of a prompt with each adapter of `names`, or with the base model where there are none."""
    from chameleon_jax.serving.prompts import tokens_of

    requests: list[LoRARequest | None] = [LoRARequest(name) for name in names] or [None]
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    token_ids = tokens_of(text, tokenizer, add_special_tokens=not chat)
    if fit:
        params = params.fit(len(token_ids), llm.engine.max_model_len)
    prompts = [{"prompt_token_ids": token_ids}] * len(requests)
    for output in llm.generate(prompts, params, requests, use_tqdm=False):
        if output.lora_request is not None:
            console.print(output.lora_request.name, style="bold")
        print(output.outputs[0].text)
