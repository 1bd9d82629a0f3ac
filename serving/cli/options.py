"""Parts that commands share: arguments, adapters by name, progress, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer import Option
from typer.core import TyperCommand

from chameleon_jax.config import EngineConfig
from chameleon_jax.systems import SYSTEMS

console = Console(stderr=True, markup=False, emoji=False)
"""Console for messages to people. Markup is off, as names and errors may come from anywhere."""

Model = Annotated[str, typer.Argument(help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id.")]
Dtype = Annotated[str, Option(help="auto, float32 or bfloat16.")]
LoadFormat = Annotated[str, Option(help="auto reads the checkpoint; dummy draws random weights.")]
MaxModelLen = Annotated[
    int | None,
    Option(
        help="Longest sequence, prompt and output, in tokens (default: the model's limit within the pool; on CPU up to 2048)."
    ),
]
MaxNumSeqs = Annotated[int, Option(help="Requests that run at once.")]
SystemName = Annotated[str, Option("--system", help=f"Scheduling and caching policies: {', '.join(SYSTEMS)}.")]
DEFAULT_SYSTEM = str(EngineConfig.system)
GenerationConfig = Annotated[
    str,
    Option(
        help="Source of sampling defaults: auto (the model's generation_config.json), none, or a directory with such a file."
    ),
]
LoraModules = Annotated[
    list[str] | None, Option("--lora-modules", help="Adapter as name=directory, in PEFT's format. Repeat for several.")
]


def named_adapters(modules: list[str] | None) -> dict[str, str]:
    """Parse `--lora-modules` into directories by name."""
    adapters = {}
    for module in modules or []:
        name, separator, path = module.partition("=")
        if not separator or not name or not path:
            raise typer.BadParameter(f"--lora-modules is {module!r}; allowed: name=directory")
        adapters[name] = path
    return adapters


def fields_of(config: type[Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Pick the flags that are named like fields of the dataclass `config`."""
    return {field.name: flags[field.name] for field in dataclasses.fields(config) if field.name in flags}


class Command(TyperCommand):
    """Command that explains how to give several adapters to a user who lists them after one --lora-modules, as for vLLM."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        gives_adapters = any(arg.partition("=")[0] == "--lora-modules" for arg in args)
        extra = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            hint = "; --lora-modules takes one adapter: repeat it for each" if gives_adapters else ""
            ctx.fail(f"Got unexpected extra arguments ({' '.join(extra)}){hint}")
        return extra


def progress(done: int, total: int) -> None:
    console.print(f"compiling programs: {done}/{total}", end="\r" if done < total else "\n")


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Report a user's mistake in one line and exit with code 1."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        console.print(Text.assemble(("error:", "red"), " ", text), soft_wrap=True)
        raise typer.Exit(1) from error
