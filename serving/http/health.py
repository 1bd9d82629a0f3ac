"""Health checks: whether the server is alive, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter, Request

import chameleon_jax
from chameleon_jax.errors import Draining
from chameleon_jax.serving.http.access import service_of
from chameleon_jax.serving.http.errors import translate_errors

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live(request: Request) -> dict[str, str]:
    """Answer 200 while the device works. Any other status: only a restart helps."""
    error = service_of(request).llm.error
    with translate_errors():
        if error is not None:
            raise error
    return {"status": "alive"}


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> dict[str, object]:
    """Answer 200 while the server takes requests, with the number of programs that are compiled.

    While some are missing, larger ones stand in for them, or, with --compile-programs lazy, requests wait for them.
    """
    await live(request)
    llm = service_of(request).llm
    with translate_errors():
        if llm.draining:
            raise Draining("the server is about to stop")
    programs = llm.engine.runner.programs
    return {"status": "ready", "programs": {"compiled": programs.num_compiled, "total": programs.num_programs}}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": chameleon_jax.__version__}
