"""Options of the engine that the commands of this folder share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

NumPages: TypeAlias = Annotated[int | None, typer.Option(help="Pages in the device pool (default: all remaining memory).")]
MaxNumSeqs: TypeAlias = Annotated[int, typer.Option(help="Requests that run at once, at most.")]
MaxNumBatchedTokens: TypeAlias = Annotated[int, typer.Option(help="Prompt tokens a step at most.")]
LoraHostGib: TypeAlias = Annotated[
    int, typer.Option(help="Host memory for adapters, GiB; more adapters than fit are kept on disk.")
]
TtftSlo: TypeAlias = Annotated[float, typer.Option(help="Target for the time to first token, seconds.")]
TbtSlo: TypeAlias = Annotated[
    float, typer.Option(help="Target for the time between tokens, seconds, for systems that bound stalls.")
]
