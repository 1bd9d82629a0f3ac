"""Access to routes: API keys, checked before a body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from chameleon_jax.serving.http.errors import translate_errors
from chameleon_jax.serving.service.service import Service

_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys, if it has any.")
"""Declared for the OpenAPI document only: `Service.check_access` reads the header itself."""


def service_of(request: Request) -> Service:
    """Service that the application was made for."""
    service: Service = request.app.state.service
    return service


async def require_access(request: Request, _: Annotated[object, Security(_bearer)]) -> None:
    with translate_errors():
        service_of(request).check_access(request.headers.get("authorization"))


async def require_admin(request: Request, _: Annotated[object, Security(_bearer)]) -> None:
    with translate_errors():
        service_of(request).check_access(request.headers.get("authorization"), admin=True)


class KeyedRoute(APIRoute):
    """Route that runs its `require_access` or `require_admin` first: FastAPI would read the whole body before dependencies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        dependencies = [depends.dependency for depends in self.dependencies]
        checks = [check for check in (require_access, require_admin) if check in dependencies]

        async def check_and_handle(request: Request) -> Response:
            for check in checks:
                await check(request, None)
            return await handle(request)

        return check_and_handle
