"""Routes for operators: metrics for Prometheus, and a live status page."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse

from chameleon_jax.errors import EngineDead
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.http.access import require_access, service_of
from chameleon_jax.serving.http.pages import inline_hash, page_headers
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.stats import EngineStats
from chameleon_jax.serving.telemetry.metrics import CONTENT_TYPE, Metrics
from chameleon_jax.serving.telemetry.recent import RecentRequests

MAX_REQUESTS = 200
"""Unfinished requests sent to the status page, running ones first."""

PAGE = Path(__file__).with_name("status.html").read_text(encoding="utf-8")


def status_router(metrics: Metrics, recent: RecentRequests) -> APIRouter:
    """Make the router.

    The page and the metrics need no key: the page holds no data, and scrapers and gateways have no keys. The page's data
    needs the same key as requests.
    """
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        service = service_of(request)
        stats = await _stats(service.llm)
        up = service.llm.error is None
        # with 100 adapters it takes 27 ms, for which streams would stand still
        text = await asyncio.to_thread(metrics.render, stats, up, service.model_name, service.is_lora)
        return Response(text, media_type=CONTENT_TYPE)

    @router.get("/")
    async def get_page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @router.get("/status.json", dependencies=[Depends(require_access)])
    async def get_status(request: Request) -> Response:
        status = await _status(service_of(request), recent)
        return Response(json.dumps(status, default=vars), media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


async def _stats(llm: AsyncLLM) -> EngineStats | None:
    """Snapshot of the engine. Where it is dead, the last snapshot without its requests, if there is one."""
    try:
        return await llm.stats()
    except EngineDead:
        last = llm.last_stats
    if last is None:
        return None
    queues = tuple(dataclasses.replace(queue, waiting=0) for queue in last.queues)
    return dataclasses.replace(last, running=0, waiting=0, queues=queues, requests=())


async def _status(service: Service, recent: RecentRequests) -> dict[str, object]:
    llm = service.llm
    stats = await _stats(llm)
    if stats is not None:
        stats = dataclasses.replace(stats, requests=stats.requests[:MAX_REQUESTS])
    return {
        "model": service.model_name,
        "uptime_s": time.time() - service.created,
        "draining": llm.draining,
        "error": None if llm.error is None else str(llm.error),
        "ttft": recent.ttft(),
        "stats": stats,
    }


PAGE_HEADERS = page_headers(script_src=inline_hash(PAGE, "script"), style_src=inline_hash(PAGE, "style"), img_src="data:")
