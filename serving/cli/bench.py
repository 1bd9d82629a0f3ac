"""`bench`: measure one batch in this process, or any server of OpenAI's API."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from typer import Option

from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.cli import bench_serve, options
from chameleon_jax.serving.cli.model_check import check_model
from chameleon_jax.serving.cli.options import errors, named_adapters, progress

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a batch, or any server of OpenAI's API.",
)


@app.command(cls=options.Command)
def throughput(
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
    """Measure one batch in this process. Requests take the adapters in turn.

    Example: chameleon-jax bench throughput smollm2-135m --num-requests 32
    """
    adapters = named_adapters(lora_modules)
    settings: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    settings |= {"max_model_len": prompt_len + output_len, "compile_programs": "ahead"}
    settings |= {"system": system, "dtype": dtype, "load_format": load_format, "enable_lora": bool(adapters)}
    with errors():
        for field, value in (("num_requests", num_requests), ("prompt_len", prompt_len), ("output_len", output_len)):
            require(value >= 1, field, value, "1 or more")
        EngineConfig.of(settings)
        check_model(model, load_format)
    import numpy as np

    from chameleon_jax.serving.llm import LLM

    with errors(), LLM(model, progress=progress, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        rng = np.random.default_rng(0)
        vocab = llm.engine.model_config.vocab_size
        prompts = [rng.integers(0, vocab, prompt_len).tolist() for _ in range(num_requests)]
        names = list(adapters)
        loras = [LoRARequest(names[i % len(names)]) if names else None for i in range(num_requests)]
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        warm_up = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        llm.generate(prompts[:1], warm_up, lora_request=loras[:1], use_tqdm=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        seconds = time.perf_counter() - begin
    ttft = [o.metrics.first_token_latency for o in outputs if o.metrics.first_token_latency is not None]
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


app.command(cls=bench_serve.ServeCommand)(bench_serve.serve)
