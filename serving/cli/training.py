"""`finetune`, `train-length-proxy` and `convert`: make adapters, length predictors and checkpoints."""

from __future__ import annotations

import json
import reprlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from chameleon_jax.checks import require
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.serving.cli.model_check import check_model
from chameleon_jax.serving.cli.options import Model, console, errors, fields_of

if TYPE_CHECKING:
    from chameleon_jax.checkpoints.checkpoint import Checkpoint

Force = Annotated[bool, Option("--force", help="Overwrite files in the output directory.")]


def finetune(
    model: Model,
    text: Annotated[Path, Option(help="UTF-8 text file to learn from.")],
    output: Annotated[Path, Option(help="Directory for the adapter, in PEFT's format.")],
    rank: Annotated[int, Option(help=f"Rank of every adapted matrix, 1 to {MAX_RANK}.")] = 8,
    alpha: Annotated[float, Option(help="Scale of the adapter: its product is multiplied by alpha / rank.")] = 16.0,
    targets: Annotated[str, Option(help="Matrices to adapt, separated by commas.")] = "q_proj,k_proj,v_proj,o_proj",
    steps: Annotated[int, Option(help="Training steps.")] = 100,
    batch_size: Annotated[int, Option(help="Sequences of one step.")] = 4,
    sequence_len: Annotated[int, Option(help="Tokens of each sequence.")] = 128,
    learning_rate: Annotated[float, Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, Option(help="Seed of the initial weights and of the order of the data.")] = 0,
    dtype: Annotated[str, Option(help="Type of the saved weights: float32 or float16.")] = "float32",
    force: Force = False,
) -> None:
    """Train a LoRA adapter on a text file.

    Example: chameleon-jax finetune smollm2-135m --text hamlet.txt --output adapters/hamlet --rank 8 --steps 100
    """
    if dtype not in ("float32", "float16"):
        raise typer.BadParameter(f"--dtype is {dtype!r}; allowed: float32, float16")
    flags = locals() | {"targets": targets.split(",")}
    with errors():
        _check_output(output, force)
        corpus = text.read_text(encoding="utf-8")
        check_model(model)
    from chameleon_jax.checkpoints import finetune as training
    from chameleon_jax.checkpoints.loading import load_checkpoint

    with errors():
        config = training.FinetuneConfig(**fields_of(training.FinetuneConfig, flags))
        report = _reporter()
        checkpoint = load_checkpoint(model)
        adapter = training.finetune(checkpoint, corpus, config, lambda step, loss: report(step, steps, loss))
        training.save(adapter, output, config, model, dtype)
    console.print(f"wrote {output}")


def train_length_proxy(
    model: Model,
    data: Annotated[
        Path,
        Option(
            help='JSONL file of {"prompt": text or "prompt_token_ids": [ids], "output_len": tokens}. '
            "The text is the whole prompt, after any chat template."
        ),
    ],
    output: Annotated[Path, Option(help="Directory for the predictor, in Orbax's format.")],
    class_cuts: Annotated[str, Option(help="Largest output length of each class but the last, in tokens.")] = "141,503",
    window: Annotated[int, Option(help="Tokens of a prompt that the predictor reads.")] = 256,
    epochs: Annotated[int, Option(help="Passes over the examples.")] = 8,
    batch_size: Annotated[int, Option(help="Examples of one step.")] = 32,
    learning_rate: Annotated[float, Option(help="Learning rate.")] = 1e-3,
    held_out: Annotated[float, Option(help="Share of the examples kept out of training, to measure accuracy.")] = 0.2,
    seed: Annotated[int, Option(help="Seed of the initial weights and of the choice of examples.")] = 0,
    force: Force = False,
) -> None:
    """Train a predictor of output lengths on past requests.

    Example: chameleon-jax train-length-proxy smollm2-135m --data requests.jsonl --output length-proxy
    """
    if not all(cut.strip().isdecimal() for cut in class_cuts.split(",")):
        raise typer.BadParameter(f"--class-cuts is {class_cuts!r}; allowed: integers, comma-separated")
    flags = locals() | {"class_cuts": [int(cut) for cut in class_cuts.split(",")]}
    with errors():
        _check_output(output, force)
        require(data.is_file(), "data", str(data), "a JSONL file")
        check_model(model)
    from chameleon_jax.checkpoints.length_proxy import save
    from chameleon_jax.checkpoints.loading import load_checkpoint
    from chameleon_jax.models.length_proxy import LengthProxyConfig, train

    with errors():
        config = LengthProxyConfig(**fields_of(LengthProxyConfig, flags))
        prompts, output_lens = _length_examples(data, load_checkpoint(model))
        proxy = train(prompts, output_lens, config, _reporter())
        save(proxy, output)
    print(f"held-out accuracy {proxy.accuracy:.3f} of {proxy.confusion.sum()} examples")
    classes = range(config.num_classes)
    print(f"{'up to':>8s} {'predicts':>8s} {'accuracy':>8s}   examples classified as " + " ".join(f"{c:6d}" for c in classes))
    for c, row in enumerate(proxy.confusion):
        cut = config.class_cuts[c] if c < len(config.class_cuts) else "any"
        counts = " ".join(f"{n:6d}" for n in row)
        print(f"{cut:>8} {proxy.class_lens[c]:8d} {row[c] / row.sum():8.3f}   class {c:<16d} {counts}")
    console.print(f"wrote {output}")


def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[str, Option(help="Format to write: orbax, or hf, the safetensors of transformers and vLLM.")] = "orbax",
    force: Force = False,
) -> None:
    """Convert a base model to another format.

    Example: chameleon-jax convert smollm2-135m ./smollm2-hf --to hf
    """
    if to not in ("orbax", "hf"):
        raise typer.BadParameter(f"--to is {to!r}; allowed: orbax, hf")
    with errors():
        is_model = output.exists() and Path(model).exists() and output.samefile(model)
        require(not is_model, "output", str(output), "another directory than the model's")
        _check_output(output, force)
        check_model(model)
    from chameleon_jax.checkpoints import huggingface, orbax
    from chameleon_jax.checkpoints.loading import load_checkpoint

    with errors():
        checkpoint = load_checkpoint(model)
        _remove_weights(output, orbax.WEIGHTS)
        (orbax if to == "orbax" else huggingface).save(checkpoint, output)
    console.print(f"wrote {output}")


def _check_output(output: Path, force: bool) -> None:
    """Check that nothing is overwritten by mistake. Raises ValueError."""
    require(not output.exists() or output.is_dir(), "output", str(output), "a directory; it is a file")
    taken = output.is_dir() and any(output.iterdir())
    require(force or not taken, "output", str(output), "a new or empty directory; --force overwrites")


def _remove_weights(directory: Path, orbax_weights: str) -> None:
    """Remove weights that a converted model would otherwise lie beside: loading prefers some formats and names."""
    shutil.rmtree(directory / orbax_weights, ignore_errors=True)
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        file.unlink()


def _reporter() -> Callable[[int, int, float], None]:
    """Make a function that prints the progress of training: step, number of steps, loss."""
    begin = time.perf_counter()

    def report(step: int, steps: int, loss: float) -> None:
        if step == 1 or step % 10 == 0 or step == steps:
            console.print(f"step {step}/{steps}  loss {loss:.3f}  {time.perf_counter() - begin:.0f} s")

    return report


def _length_examples(file: Path, checkpoint: Checkpoint) -> tuple[list[list[int]], list[int]]:
    """Read token ids of prompts and output lengths in tokens. Raises ValueError that names the file and line."""
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
    """Check one line. Returns the prompt, text or token ids, and the output length in tokens."""

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
