"""Who may use a route, as dependencies of FastAPI."""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPBearer

from chameleon_jax.serving.http.errors import answered
from chameleon_jax.serving.service import Service

_bearer = HTTPBearer(auto_error=False, description="A key of the server, where it has any.")
"""Only documents; the header is read as it came."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def require_access(request: Request, _: Annotated[object, Security(_bearer)]) -> None:
    with answered():
        service_of(request).check_access(request.headers.get("authorization"))


async def require_admin(request: Request, _: Annotated[object, Security(_bearer)]) -> None:
    with answered():
        service_of(request).check_access(request.headers.get("authorization"), admin=True)
