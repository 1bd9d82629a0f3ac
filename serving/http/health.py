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
async def ready(request: Request) -> dict[str, str]:
    """Answer 200 while the server takes requests."""
    await live(request)
    with translate_errors():
        if service_of(request).llm.draining:
            raise Draining("the server is about to stop")
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": chameleon_jax.__version__}
