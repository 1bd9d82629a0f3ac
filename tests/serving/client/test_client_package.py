"""The distribution of the clients alone: it runs without JAX and without the whole package, and beside it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    modules = runpy.run_path(str(ROOT / "clients" / "python" / "stage.py"))["stage"](folder)
    assert len(modules) < 20 and not any(
        part in name for name in modules for part in ("engine", "models", "checkpoints", "http")
    )
    return folder


def run_code(code: str, *path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120, cwd=path[0]).stdout


def test_the_client_alone_asks_a_server(staged, server):
    code = f"""
import sys
sys.modules["jax"] = sys.modules["chameleon_jax"] = None  # importing one is an error
from chameleon_jax_client import Client, SamplingParams
with Client("{server.target}", timeout=60) as client:
    print(client.generate("love is", SamplingParams(temperature=0, max_tokens=5), lora_name="a1").completion_tokens)
"""
    assert run_code(code, staged) == "5\n"


def test_both_packages_work_in_one_process(staged):
    code = "import chameleon_jax_client as a, chameleon_jax.serving.client as b; print(a.Client is b.Client)"
    assert run_code(code, staged, ROOT) == "False\n"


def test_version_and_dependencies_are_those_of_the_whole_package():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert PROJECT["version"] == whole["version"] and PROJECT["requires-python"] == whole["requires-python"]
    assert set(PROJECT["dependencies"]) <= set(whole["dependencies"])
