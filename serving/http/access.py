"""Who may use a route, as dependencies of FastAPI."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from chameleon_jax.serving.http.errors import answered
from chameleon_jax.serving.service.service import Service

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


class KeyedRoute(APIRoute):
    """Asks `require_access` or `require_admin`, where it has them, before the body is read: FastAPI reads the body first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        asked = [depends.dependency for depends in self.dependencies]
        checks = [check for check in (require_access, require_admin) if check in asked]

        async def checked(request: Request) -> Response:
            for check in checks:
                await check(request, None)
            return await handle(request)

        return checked
