"""`generate` and `bench`: complete a prompt, and measure completions."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from typer import Option

from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.serving.cli import options
from chameleon_jax.serving.cli.options import console, errors, named_adapters, progress


def generate(
    model: options.Model,
    prompt: Annotated[str, Option(help="Text to continue. With --chat, the user's message.")],
    lora_modules: options.LoraModules = None,
    lora: Annotated[
        list[str] | None,
        Option(
            help="Adapter to answer with (default: each of --lora-modules, else the base model). Repeat to compare several."
        ),
    ] = None,
    chat: Annotated[bool, Option(help="Wrap the prompt in the model's chat template.")] = False,
    max_tokens: Annotated[int | None, Option(help="Most output tokens (default: the model's own, else 128).")] = None,
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
    """Complete one prompt, with the base model or with adapters.

    Example: chameleon-jax generate smollm2-135m --prompt "What is the capital of France?" --chat
    """
    from chameleon_jax.sampling_params import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM
    from chameleon_jax.serving.prompts import tokens_of

    adapters = named_adapters(lora_modules)
    fields = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given: dict[str, Any] = {name: value for name, value in (fields | {"seed": seed}).items() if value is not None}
    with errors():
        SamplingParams(**given)
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "enable_lora": bool(adapters)}
    settings |= {"system": system, "generation_config": generation_config, "compile_ahead": False}
    with errors(), LLM(model, dtype=dtype, max_model_len=max_model_len, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        requests: list[LoRARequest | None] = [LoRARequest(name) for name in lora or adapters] or [None]
        tokenizer = llm.get_tokenizer()
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
        token_ids = tokens_of(text, tokenizer, add_special_tokens=not chat)
        params = SamplingParams(**{"max_tokens": 128, "temperature": 0.0, **llm.engine.sampling_defaults.values, **given})
        if max_tokens is None:
            params = params.fit(len(token_ids), llm.engine.max_model_len)
        for output in llm.generate([{"prompt_token_ids": token_ids}] * len(requests), params, requests):
            if output.lora_request is not None:
                console.print(output.lora_request.name, style="bold")
            print(output.outputs[0].text)


def bench(
    model: options.Model,
    lora_modules: options.LoraModules = None,
    num_requests: Annotated[int, Option(help="Requests, all submitted at once.")] = 16,
    prompt_len: Annotated[int, Option(help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, Option(help="Tokens of each output.")] = 64,
    max_num_seqs: options.MaxNumSeqs = EngineConfig.max_num_seqs,
    max_num_batched_tokens: Annotated[int, Option(help="Prompt tokens of one step.")] = EngineConfig.max_num_batched_tokens,
    dtype: options.Dtype = "auto",
    load_format: options.LoadFormat = "auto",
    system: options.SystemName = options.DEFAULT_SYSTEM,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure throughput and time to first token of one batch. Requests take the adapters in turn.

    Example: chameleon-jax bench smollm2-135m --num-requests 32
    """
    import numpy as np

    from chameleon_jax.sampling_params import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM

    with errors():
        for field, value in (("num_requests", num_requests), ("prompt_len", prompt_len), ("output_len", output_len)):
            require(value >= 1, field, value, "1 or more")
    adapters = named_adapters(lora_modules)
    settings: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    settings["max_model_len"] = prompt_len + output_len
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
