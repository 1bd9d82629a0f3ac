"""Completing prompts from the command line, and measuring it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from chameleon_jax.checks import require
from chameleon_jax.serving.cli.options import (
    DEFAULT_GENERATION_CONFIG,
    DEFAULT_SYSTEM,
    GenerationConfig,
    LoraModules,
    Model,
    SystemName,
    console,
    errors,
    named_adapters,
    progress,
)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from; with --chat, what the user says.")],
    lora_modules: LoraModules = None,
    lora: Annotated[list[str] | None, typer.Option(help="Adapter to answer with; several answer side by side.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens at most (default: the model's own, else 128).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the model's own, else 0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of the probability mass that is kept.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Tokens that are kept; 0 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability that is kept, relative to the best token's.")] = None,
    seed: int | None = None,
    generation_config: GenerationConfig = DEFAULT_GENERATION_CONFIG,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    max_model_len: int | None = None,
    system: SystemName = DEFAULT_SYSTEM,
) -> None:
    """Complete one prompt, with the base model or with adapters.

    Example: chameleon-jax generate smollm2-135m --prompt "What is the capital of France?" --chat
    """
    from chameleon_jax.sampling_params import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM
    from chameleon_jax.serving.prompts import tokens_of
    from chameleon_jax.serving.sampling_defaults import fit_max_tokens

    adapters = named_adapters(lora_modules)
    fields = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given: dict[str, Any] = {name: value for name, value in (fields | {"seed": seed}).items() if value is not None}
    with errors():
        SamplingParams(**given)
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "enable_lora": bool(adapters)}
    settings |= {"system": system, "generation_config": generation_config}
    with errors(), LLM(model, dtype=dtype, max_model_len=max_model_len, progress=progress, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        requests: list[LoRARequest | None] = [LoRARequest(name) for name in lora or adapters] or [None]
        tokenizer = llm.get_tokenizer()
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
        token_ids = tokens_of(text, tokenizer, add_special_tokens=not chat)
        params = SamplingParams(**{"max_tokens": 128, "temperature": 0.0, **llm.engine.sampling_defaults.values, **given})
        if max_tokens is None:
            params = fit_max_tokens(params, len(token_ids), llm.engine.max_model_len)
        for output in llm.generate([{"prompt_token_ids": token_ids}] * len(requests), params, requests):
            if output.lora_request is not None:
                console.print(output.lora_request.name, style="bold")
            print(output.outputs[0].text)


def bench(
    model: Model,
    lora_modules: LoraModules = None,
    num_requests: Annotated[int, typer.Option(help="Requests, all submitted at once.")] = 16,
    prompt_len: int = 128,
    output_len: int = 64,
    max_num_seqs: int = 32,
    dtype: str = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
    system: SystemName = DEFAULT_SYSTEM,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Measure throughput and time to first token of one batch; adapters are given to requests in turn.

    Example: chameleon-jax bench smollm2-135m --num-requests 32
    """
    import numpy as np

    from chameleon_jax.sampling_params import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM

    with errors():
        for field, value in (("num_requests", num_requests), ("prompt_len", prompt_len), ("output_len", output_len)):
            require(value >= 1, field, value, "1 or more")
    adapters = named_adapters(lora_modules)
    settings: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_model_len": prompt_len + output_len}
    settings |= {"system": system, "dtype": dtype, "load_format": load_format, "enable_lora": bool(adapters)}
    settings["progress"] = progress
    with errors(), LLM(model, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        rng = np.random.default_rng(0)
        vocab = llm.engine.model_config.vocab_size
        prompts = [rng.integers(0, vocab, prompt_len).tolist() for _ in range(num_requests)]
        names = list(adapters)
        loras = [LoRARequest(names[i % len(names)]) if names else None for i in range(num_requests)]
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), lora_request=loras[:1])
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=loras)
        seconds = time.perf_counter() - begin
    ttft = [o.metrics.first_token_time - o.metrics.arrival_time for o in outputs if o.metrics.first_token_time is not None]
    result = {
        "requests": num_requests,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "adapters": len(adapters),
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(num_requests * output_len / seconds, 1),
        "ttft_p50_s": round(float(np.percentile(ttft, 50)), 4),
        "ttft_p99_s": round(float(np.percentile(ttft, 99)), 4),
    }
    print(json.dumps(result) if as_json else "\n".join(f"{key:20s} {value}" for key, value in result.items()))
