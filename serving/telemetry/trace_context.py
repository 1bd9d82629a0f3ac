"""The caller's trace, as W3C headers carry it, from a protocol to the engine."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping

HEADERS = ("traceparent", "tracestate")

_current: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("trace_context", default=None)


def receive(headers: Mapping[str, str]) -> None:
    """Note the trace of the call that this task serves. Args: headers: headers or metadata, names in lower case."""
    _current.set({name: headers[name] for name in HEADERS if name in headers} or None)


def current() -> dict[str, str] | None:
    """Headers of the caller's trace; None where it sent none."""
    return _current.get()
