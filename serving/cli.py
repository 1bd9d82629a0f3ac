"""The command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import reprlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from chameleon_jax.config import EngineConfig
from chameleon_jax.systems import SYSTEMS

if TYPE_CHECKING:
    from chameleon_jax.checkpoints.checkpoint import Checkpoint

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve hundreds of LoRA adapters over one base model.\n\nMODEL is a preset (smollm2-135m), a GGUF file, "
    "a Hugging Face or Orbax directory, or a hub id.",
)
console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id.")]
SystemName = Annotated[str, typer.Option("--system", help=f"Who starts next, what stays: {', '.join(SYSTEMS)}.")]
DEFAULT_SYSTEM = str(EngineConfig.system)
LoraModules = Annotated[
    list[str] | None,
    typer.Option("--lora-modules", help="Adapter as name=directory (PEFT). May be given several times."),
]


def _adapters(modules: list[str] | None) -> dict[str, str]:
    adapters = {}
    for module in modules or []:
        name, separator, path = module.partition("=")
        if not separator or not name or not path:
            raise typer.BadParameter(f"--lora-modules is {module!r}; allowed: name=directory")
        adapters[name] = path
    return adapters


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from; with --chat, what the user says.")],
    lora_modules: LoraModules = None,
    lora: Annotated[list[str] | None, typer.Option(help="Adapter to answer with; several answer side by side.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    max_model_len: int | None = None,
    system: SystemName = DEFAULT_SYSTEM,
) -> None:
    """Complete one prompt, with the base model or with adapters.

    Example: chameleon-jax generate smollm2-135m --prompt "What is the capital of France?" --chat
    """
    from chameleon_jax.request import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM

    adapters = _adapters(lora_modules)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "enable_lora": bool(adapters)}
    settings["system"] = system
    with _errors(), LLM(model, dtype=dtype, max_model_len=max_model_len, progress=_progress, **settings) as llm:
        for name, path in adapters.items():
            llm.add_lora(name, path)
        requests: list[LoRARequest | None] = [LoRARequest(name) for name in lora or adapters] or [None]
        messages = [{"role": "user", "content": prompt}]
        count = len(requests)
        for output in (
            llm.chat([messages] * count, params, requests) if chat else llm.generate([prompt] * count, params, requests)
        ):
            if output.lora_request is not None:
                console.print(f"[bold]{output.lora_request.name}[/bold]")
            print(output.outputs[0].text)


@app.command()
def finetune(
    model: Model,
    text: Annotated[Path, typer.Option(help="UTF-8 text file to learn from.")],
    output: Annotated[Path, typer.Option(help="Directory for the adapter, in PEFT's format.")],
    rank: int = 8,
    alpha: float = 16.0,
    targets: Annotated[str, typer.Option(help="Matrices, comma-separated.")] = "q_proj,k_proj,v_proj,o_proj",
    steps: int = 100,
    batch_size: int = 4,
    sequence_len: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="Of the file: float32 or float16.")] = "float32",
) -> None:
    """Train a LoRA adapter on a text file.

    Example: chameleon-jax finetune smollm2-135m --text hamlet.txt --output adapters/hamlet --rank 8 --steps 100
    """
    from chameleon_jax.checkpoints import finetune as training
    from chameleon_jax.checkpoints.loading import load_checkpoint

    if dtype not in ("float32", "float16"):
        raise typer.BadParameter(f"--dtype is {dtype!r}; allowed: float32, float16")
    with _errors():
        config = training.FinetuneConfig(
            rank=rank,
            alpha=alpha,
            targets=targets.split(","),
            steps=steps,
            batch_size=batch_size,
            sequence_len=sequence_len,
            learning_rate=learning_rate,
            seed=seed,
        )
        begin = time.perf_counter()

        def report(step: int, loss: float) -> None:
            if step == 1 or step % 10 == 0 or step == steps:
                console.print(f"step {step}/{steps}  loss {loss:.3f}  {time.perf_counter() - begin:.0f} s")

        adapter = training.finetune(load_checkpoint(model), text.read_text(encoding="utf-8"), config, report)
        training.save(adapter, output, config, model, dtype)
    console.print(f"wrote {output}")


@app.command()
def train_length_proxy(
    model: Model,
    data: Annotated[
        Path, typer.Option(help='JSONL of {"prompt": text as served or "prompt_token_ids": [ids], "output_len": tokens}.')
    ],
    output: Annotated[Path, typer.Option(help="Directory for the proxy, in Orbax's format.")],
    class_cuts: Annotated[str, typer.Option(help="Largest output length of each class but the last, tokens.")] = "141,503",
    window: Annotated[int, typer.Option(help="Tokens of a prompt that are read.")] = 256,
    epochs: int = 8,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    held_out: Annotated[float, typer.Option(help="Share of the examples that only measures.")] = 0.2,
    seed: int = 0,
) -> None:
    """Train the predictor of output lengths on past requests.

    Example: chameleon-jax train-length-proxy smollm2-135m --data requests.jsonl --output length-proxy
    """
    from chameleon_jax.checkpoints.length_proxy import save
    from chameleon_jax.checkpoints.loading import load_checkpoint
    from chameleon_jax.models.length_proxy import LengthProxyConfig, train

    if not all(cut.strip().isdecimal() for cut in class_cuts.split(",")):
        raise typer.BadParameter(f"--class-cuts is {class_cuts!r}; allowed: integers, comma-separated")
    with _errors():
        config = LengthProxyConfig(
            class_cuts=[int(cut) for cut in class_cuts.split(",")],
            window=window,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            held_out=held_out,
            seed=seed,
        )
        prompts, output_lens = _length_examples(data, load_checkpoint(model))
        begin = time.perf_counter()

        def report(step: int, steps: int, loss: float) -> None:
            if step == 1 or step % 10 == 0 or step == steps:
                console.print(f"step {step}/{steps}  loss {loss:.3f}  {time.perf_counter() - begin:.0f} s")

        proxy = train(prompts, output_lens, config, report)
        save(proxy, output)
    print(f"held-out accuracy {proxy.accuracy:.3f} of {proxy.confusion.sum()} examples")
    classes = range(config.num_classes)
    print(f"{'up to':>8s} {'predicts':>8s} {'accuracy':>8s}   examples classified as " + " ".join(f"{c:6d}" for c in classes))
    for c, row in enumerate(proxy.confusion):
        cut = config.class_cuts[c] if c < len(config.class_cuts) else "any"
        counts = " ".join(f"{n:6d}" for n in row)
        print(f"{cut:>8} {proxy.class_lens[c]:8d} {row[c] / row.sum():8.3f}   class {c:<16d} {counts}")
    console.print(f"wrote {output}")


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[str, typer.Option(help="orbax, or hf: safetensors that transformers and vLLM read.")] = "orbax",
) -> None:
    """Convert a base model.

    Example: chameleon-jax convert smollm2-135m ./smollm2-hf --to hf
    """
    from chameleon_jax.checkpoints import huggingface, orbax
    from chameleon_jax.checkpoints.loading import load_checkpoint

    if to not in ("orbax", "hf"):
        raise typer.BadParameter(f"--to is {to!r}; allowed: orbax, hf")
    with _errors():
        checkpoint = load_checkpoint(model)
        (orbax if to == "orbax" else huggingface).save(checkpoint, output)
    console.print(f"wrote {output}")


@app.command()
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

    from chameleon_jax.request import LoRARequest, SamplingParams
    from chameleon_jax.serving.llm import LLM

    adapters = _adapters(lora_modules)
    settings: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_model_len": prompt_len + output_len}
    settings |= {"system": system, "dtype": dtype, "load_format": load_format, "enable_lora": bool(adapters)}
    settings["progress"] = _progress
    with _errors(), LLM(model, **settings) as llm:
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


def _length_examples(file: Path, checkpoint: Checkpoint) -> tuple[list[list[int]], list[int]]:
    """Prompts' token ids and output lengths in tokens. Raises ValueError naming file:line, field, value and what is allowed."""
    prompts, output_lens = [], []
    vocab_size, tokenizer = checkpoint.config.vocab_size, checkpoint.tokenizer
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prompt, output_len = _length_example(json.loads(line), vocab_size)
                if isinstance(prompt, str):
                    if tokenizer is None:
                        raise ValueError("prompt is text, but the model has no tokenizer; allowed: prompt_token_ids")
                    prompt = tokenizer.encode(prompt)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from error
            prompts.append(prompt)
            output_lens.append(output_len)
    return prompts, output_lens


def _length_example(example: Any, vocab_size: int) -> tuple[str | list[int], int]:
    """Text or token ids, and output tokens, of one line's JSON."""

    def require(condition: bool, field: str, value: Any, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field} is {reprlib.repr(value)}; allowed: {allowed}")

    require(isinstance(example, dict), "the line", example, "an object")
    text, ids, output_len = (example.get(field) for field in ("prompt", "prompt_token_ids", "output_len"))
    if (text is None) == (ids is None):
        raise ValueError(f"fields are {', '.join(example)}; allowed: output_len, and one of prompt and prompt_token_ids")
    require(type(output_len) is int and 1 <= output_len < 2**31, "output_len", output_len, "an integer from 1")
    if ids is None:
        require(isinstance(text, str) and text != "", "prompt", text, "text that is not empty")
        return text, output_len
    require(isinstance(ids, list) and bool(ids), "prompt_token_ids", ids, "a list that is not empty")
    for i, token in enumerate(ids):
        if not (type(token) is int and 0 <= token < vocab_size):
            require(False, f"prompt_token_ids[{i}]", token, f"an id from 0 to {vocab_size - 1}")
    return ids, output_len


def _progress(done: int, total: int) -> None:
    console.print(f"compiling programs: {done}/{total}", end="\r" if done < total else "\n")


class _errors:
    """Turns what a user did wrong into one line and exit code 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | KeyError | OSError):
            console.print(f"[red]error:[/red] {error.args[0] if isinstance(error, KeyError) else error}")
            raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
