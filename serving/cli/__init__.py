"""The command line. Each command imports the heavy modules it needs."""

from __future__ import annotations

import typer

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
for command in (serve, generate, finetune, train_length_proxy, convert):
    app.command(cls=Command)(command)
app.add_typer(bench.app, name="bench")
