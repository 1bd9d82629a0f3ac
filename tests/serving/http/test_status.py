from __future__ import annotations

import asyncio
import contextlib
import html.parser
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from chameleon_jax.errors import EngineDead, Unauthenticated
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.http.status import MAX_REQUESTS, status_router
from chameleon_jax.serving.stats import EngineStats
from chameleon_jax.serving.telemetry.metrics import Metrics
from chameleon_jax.serving.telemetry.recent import RecentRequests
from tests.serving.conftest import make_service
from tests.serving.telemetry.engine_stats import engine_stats

BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
)
HOSTILE = "<img src=x onerror=document.title='executed'>"


class StubLLM:
    """Engine with given stats. With an error it is dead, and they are its last."""

    def __init__(self, stats: EngineStats | None, error: str | None = None, draining: bool = False):
        self.last_stats = stats
        self.error = None if error is None else EngineDead(error)
        self.draining = draining

    async def stats(self) -> EngineStats:
        if self.error is not None:
            raise self.error
        assert self.last_stats is not None
        return self.last_stats


class StubService:
    model_name = "model"
    created = time.time() - 100

    def __init__(self, llm: StubLLM, locked: bool = False):
        self.llm = llm
        self.locked = locked

    def is_lora(self, name: str) -> bool:
        return True

    def check_access(self, authorization: str | None, admin: bool = False) -> None:
        if self.locked:
            raise Unauthenticated("no key")


def make_app(service: Any, metrics: Metrics | None = None, recent: RecentRequests | None = None) -> FastAPI:
    app = FastAPI()
    app.state.service = service
    if metrics is None:
        metrics = Metrics()
        metrics.close()
    app.include_router(status_router(metrics, recent or RecentRequests()))

    @app.exception_handler(Unauthenticated)
    async def refuse(request: Request, error: Unauthenticated) -> Response:
        return JSONResponse({"error": str(error)}, 401)

    return app


def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(request())


# -- what is served -------------------------------------------------------------------------------------------------------


def test_status_of_a_real_engine(shared_llm, adapter_dir):
    service, metrics, recent = make_service(shared_llm, adapter_dir), Metrics(), RecentRequests()

    async def serve() -> None:
        await service.load_named({})
        async for _ in shared_llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True), LoRARequest("a2")):
            pass
        await shared_llm.stats(max_age=0)

    shared_llm.observers += [metrics, recent]
    try:
        asyncio.run(serve())
    finally:
        shared_llm.observers.remove(metrics)
        shared_llm.observers.remove(recent)
        metrics.close()
    app = make_app(service, metrics, recent)
    status = get(app, "/status.json").json()
    assert status["model"] == "gqa" and status["error"] is None and status["draining"] is False
    assert status["ttft"]["count"] == 1 and status["ttft"]["p50"] == status["ttft"]["p99"] > 0
    (a2,) = [a for a in status["stats"]["adapters"] if "a2" in a["names"]]
    assert (a2["rank"], a2["tier"]) == (16, "resident") and a2["uses"] >= 1
    assert sum(status["stats"]["pool"][owner] for owner in ("kv", "adapters", "free")) == status["stats"]["pool"]["total"]
    scraped = get(app, "/metrics")
    assert scraped.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'chameleon:request_success_total{finished_reason="length"} 1.0' in scraped.text


def test_the_data_of_the_page_needs_a_key_and_the_rest_none(shared_llm, adapter_dir):
    app = make_app(make_service(shared_llm, adapter_dir, api_keys=("secret",)))
    assert get(app, "/status.json").status_code == 401
    assert get(app, "/status.json", authorization="Bearer wrong").status_code == 401
    assert get(app, "/status.json", authorization="Bearer secret").status_code == 200
    assert get(app, "/metrics").status_code == 200
    assert get(app, "/").status_code == 200


def test_many_requests_are_cut_short_and_counted():
    stats = engine_stats(["a"], num_running=8, num_waiting=500)
    status = get(make_app(StubService(StubLLM(stats))), "/status.json").json()["stats"]
    assert len(status["requests"]) == MAX_REQUESTS and status["waiting"] == 500
    assert [r["state"] for r in status["requests"][:9]] == ["running"] * 8 + ["waiting"]


def test_status_of_an_engine_that_died_before_its_first_stats():
    status = get(make_app(StubService(StubLLM(None, "the device is gone"))), "/status.json").json()
    assert status["stats"] is None and status["error"] == "the device is gone"


@pytest.mark.parametrize("stats", [engine_stats(["a"]), None])
def test_an_engine_that_is_dead_is_still_scraped(stats):
    scraped = get(make_app(StubService(StubLLM(stats, "the device is gone"))), "/metrics")
    assert scraped.status_code == 200
    assert (
        "\nchameleon:engine_up 0.0\n" in scraped.text and "\nchameleon:time_to_first_token_seconds_count 0.0\n" in scraped.text
    )
    for name, last in (("num_requests_running", 4), ("num_requests_queued", 1), ('num_requests_waiting{queue="0"}', 1)):
        assert f"chameleon:{name} {last}.0" not in scraped.text
        assert (f"chameleon:{name} 0.0" in scraped.text) == (stats is not None)
    assert ("chameleon:generation_tokens_total 2000.0" in scraped.text) == (stats is not None)


def test_last_stats_of_a_dead_engine_list_no_requests():
    stats = get(make_app(StubService(StubLLM(engine_stats(["a"]), "the device is gone"))), "/status.json").json()["stats"]
    assert (stats["running"], stats["waiting"], stats["requests"], stats["loop"]["finished"]) == (0, 0, [], 50)


def test_the_page_may_only_run_its_own_script_and_ask_its_own_server():
    page = get(make_app(StubService(StubLLM(engine_stats([])))), "/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for source in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[source])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)  # nothing is fetched from elsewhere
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page.text)


# -- what a browser makes of it -------------------------------------------------------------------------------------------


class Document(html.parser.HTMLParser):
    """Texts by the id of their element, rows of tables by the id of their body, and all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.shown: dict[str, bool] = {}
        self.tags: list[str] = []
        self._id = self._body = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "tbody":
            self._body = str(given["id"])
            self.rows[self._body] = []
        elif tag == "tr" and self._body:
            self.rows[self._body].append([])
        elif tag == "td":
            self.rows[self._body][-1].append("")
        self._id = given.get("id") or ""
        self.shown[self._id] = "hidden" not in given

    def handle_endtag(self, tag: str) -> None:
        self._id = ""
        if tag == "tbody":
            self._body = ""

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data
        if self._body and self.rows[self._body]:
            self.rows[self._body][-1][-1] += data


@contextlib.contextmanager
def served(service: Any) -> Iterator[str]:
    """Run a server in a thread and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def browse(service: Any, tmp_path: Path) -> Document:
    """Open the page and return its document after five seconds. Fails on any message in the browser's console."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with served(service) as url:
        command = [chromium, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'browser'}", url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in run.stderr.splitlines() if "CONSOLE" in line and "status of 401" not in line]
    assert complaints == []
    return Document(run.stdout)


def test_the_page_with_500_adapters_and_hostile_names(tmp_path):
    names = [HOSTILE, *(f"adapter-{i:03d}" for i in range(1, 500))]
    page = browse(StubService(StubLLM(engine_stats(names, num_running=3, num_waiting=2))), tmp_path)
    assert page.texts["state"] == "serving" and not page.shown["banner"] and not page.shown["key-form"]
    assert (page.texts["running"], page.texts["waiting"], page.texts["hit-rate"]) == ("3", "2", "75.0%")
    assert [row[1:3] for row in page.rows["requests"]] == [
        [HOSTILE, "running"],
        ["adapter-001", "running"],
        ["adapter-002", "running"],
        ["adapter-003", "waiting"],
        ["adapter-004", "waiting"],
    ]
    assert [row[:3] for row in page.rows["queues"]] == [["0", "2", "20 of 60"], ["1", "0", "45 of 40"]]
    adapters = page.rows["adapters"]
    assert len(adapters) == 100 and page.texts["adapters-note"] == "500 known, 167 in the pool; 100 shown"
    assert adapters[0][:3] == ["adapter-498", "8", "resident"]  # what is in the pool and used most comes first
    assert "img" not in page.tags


def test_hostile_names_stay_text(tmp_path):
    page = browse(StubService(StubLLM(engine_stats([HOSTILE], num_running=1))), tmp_path)
    assert page.rows["adapters"][0][0] == page.rows["requests"][0][1] == HOSTILE
    assert "img" not in page.tags


def test_a_locked_page_asks_for_the_key_and_shows_nothing(tmp_path):
    page = browse(StubService(StubLLM(engine_stats(["a"])), locked=True), tmp_path)
    assert page.shown["key-form"] and page.texts["state"] == "locked"
    assert page.rows["adapters"] == [] and page.texts["running"] == "–"


@pytest.mark.parametrize(
    "llm, state, banner",
    [
        (StubLLM(engine_stats(["a"]), error="the device hangs"), "dead", "The engine is dead: the device hangs."),
        (StubLLM(None, error="the device hangs"), "dead", "The engine is dead: the device hangs."),
        (StubLLM(engine_stats(["a"]), draining=True), "draining", "The server is about to stop"),
    ],
)
def test_the_banner_shows_trouble(llm, state, banner, tmp_path):
    page = browse(StubService(llm), tmp_path)
    assert page.texts["state"] == state
    assert page.shown["banner"] and page.texts["banner"].startswith(banner)
