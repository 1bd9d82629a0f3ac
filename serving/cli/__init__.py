"""The command line. Each command imports the heavy modules it needs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import chameleon_jax
from chameleon_jax.serving.cli import bench
from chameleon_jax.serving.cli.generate import generate
from chameleon_jax.serving.cli.options import Command
from chameleon_jax.serving.cli.serve import serve
from chameleon_jax.serving.cli.training import convert, finetune, train_length_proxy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve hundreds of LoRA adapters over one base model.\n\nMODEL is a preset (smollm2-135m), a GGUF file, "
    "a Hugging Face or Orbax directory, or a hub id.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chameleon-jax {chameleon_jax.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    # XLA logs alarms about slow compilations as errors. Level 3 keeps fatal ones only; other failures of XLA are raised as
    # exceptions, which are reported. JAX reads the variable when a command imports it
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


for command in (serve, generate, finetune, train_length_proxy, convert):
    app.command(cls=Command)(command)
app.add_typer(bench.app, name="bench")
