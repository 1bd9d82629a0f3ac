"""Commands as a user types them, in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from chameleon_jax.serving.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])
