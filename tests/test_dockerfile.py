"""The image's recipe names things that exist. No image is built."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import typer

from chameleon_jax.serving.cli import app
from chameleon_jax.serving.http.health import router

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_extras_and_python_are_those_of_the_project():
    named = set(re.findall(r"\b(?:cuda\d+|otel)\b", DOCKERFILE))
    assert named == set(PROJECT["optional-dependencies"])
    [install] = re.findall(r"pip install .*", DOCKERFILE)
    assert '".${EXTRAS:+[${EXTRAS}]}"' in install
    [python] = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE)
    least = PROJECT["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))


def test_the_server_is_started_and_checked_as_the_project_has_it():
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    program, command, *flags = json.loads(entry)
    assert program in PROJECT["scripts"]
    group: Any = typer.main.get_command(app)
    serve = group.commands[command]
    options = {option for parameter in serve.params for option in parameter.opts}
    flagged = [*flags, *re.findall(r"--adapter-dir", DOCKERFILE)]
    assert {flag for flag in flagged if flag.startswith("--")} <= options
    assert "/health/ready" in {getattr(route, "path", None) for route in router.routes} and "8000/health/ready" in DOCKERFILE


def test_the_image_runs_without_root_and_copies_what_the_build_needs():
    stages = DOCKERFILE.split("\nFROM ")
    assert "\nUSER chameleon\n" in stages[-1] and "USER root" not in DOCKERFILE
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    links = {path.name for path in (ROOT / "chameleon_jax").iterdir() if path.is_symlink()}
    assert kept == {"pyproject.toml", "README.md", "LICENSE", "chameleon_jax", *links}
