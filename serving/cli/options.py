"""What commands have in common: arguments, adapters by name, progress, and errors in one line."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from chameleon_jax.config import EngineConfig
from chameleon_jax.systems import SYSTEMS

console = Console(stderr=True, markup=False, emoji=False)
"""For people. Names and errors may come from anywhere: nothing in them is markup."""

Model = Annotated[str, typer.Argument(help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id.")]
SystemName = Annotated[str, typer.Option("--system", help=f"Who starts next, what stays: {', '.join(SYSTEMS)}.")]
DEFAULT_SYSTEM = str(EngineConfig.system)
GenerationConfig = Annotated[
    str,
    typer.Option(help="Sampling defaults: auto (the model's generation_config.json), none, or a directory with such a file."),
]
DEFAULT_GENERATION_CONFIG = EngineConfig.generation_config
LoraModules = Annotated[
    list[str] | None,
    typer.Option("--lora-modules", help="Adapter as name=directory (PEFT). May be given several times."),
]


def named_adapters(modules: list[str] | None) -> dict[str, str]:
    adapters = {}
    for module in modules or []:
        name, separator, path = module.partition("=")
        if not separator or not name or not path:
            raise typer.BadParameter(f"--lora-modules is {module!r}; allowed: name=directory")
        adapters[name] = path
    return adapters


class Command(TyperCommand):
    """Says how several adapters are given where they are given as to vLLM: all of them after one --lora-modules."""

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


class errors:
    """Turns what a user did wrong into one line and exit code 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | KeyError | OSError):
            text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
            console.print(Text.assemble(("error:", "red"), " ", text), soft_wrap=True)
            raise typer.Exit(1) from error
