"""What operators see: metrics for Prometheus, and a page that shows the engine at work."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse

from chameleon_jax.serving.errors import EngineDead
from chameleon_jax.serving.http.access import require_access
from chameleon_jax.serving.service import Service
from chameleon_jax.serving.telemetry.metrics import CONTENT_TYPE, Metrics
from chameleon_jax.serving.telemetry.recent import RecentRequests

MAX_REQUESTS = 200
"""Unfinished requests that the page is told of, those that run first."""

PAGE = Path(__file__).with_name("status.html").read_text(encoding="utf-8")


def status_router(metrics: Metrics, recent: RecentRequests) -> APIRouter:
    """The page and the metrics are open to all, as the page holds no data and scrapers and gateways have no keys; the data of
    the page needs what requests need."""
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        service: Service = request.app.state.service
        return Response(metrics.render(await service.llm.stats()), media_type=CONTENT_TYPE)

    @router.get("/")
    async def get_page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @router.get("/status.json", dependencies=[Depends(require_access)])
    async def get_status(request: Request) -> Response:
        status = await _status(request.app.state.service, recent)
        return Response(json.dumps(status, default=vars), media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


async def _status(service: Service, recent: RecentRequests) -> dict[str, object]:
    llm = service.llm
    try:
        stats = await llm.stats()
        stats = dataclasses.replace(stats, requests=stats.requests[:MAX_REQUESTS])
    except EngineDead:  # and nobody asked before it died
        stats = None
    return {
        "model": service.model_name,
        "uptime_s": time.time() - service.created,
        "draining": llm.draining,
        "error": None if llm.error is None else str(llm.error),
        "ttft": recent.ttft(),
        "stats": stats,
    }


def _hash(element: str) -> str:
    """What a content security policy calls the only text of such an element that may run."""
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
