"""`/docs` in a browser without the internet."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from chameleon_jax.serving.http.docs import FILES
from tests.serving.http.test_status import BROWSER_FLAGS


def test_the_page_and_its_files_come_from_the_server(http):
    page = http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?://", page.text)
    named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert {name.removeprefix("docs/") for name in named} == set(FILES)
    for name, kind in FILES.items():
        file = http.get(f"/docs/{name}")
        assert file.status_code == 200 and file.content and file.headers["content-type"].startswith(kind)
        assert file.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2Fmain.py"])
def test_no_other_file_is_served(http, name):
    assert http.get(f"/docs/{name}").status_code == 404


def test_the_page_may_run_its_own_scripts_and_ask_its_own_server_only(http):
    headers = http.get("/docs").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in policy["script-src"]
    assert headers["referrer-policy"] == "no-referrer"


def test_a_browser_shows_every_route(server, http, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    command = [chromium, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'browser'}", f"{server.url}/docs"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line] == []
    shown = set(re.findall(r'data-path="([^"]+)"', run.stdout))
    assert set(http.get("/openapi.json").json()["paths"]) <= shown
