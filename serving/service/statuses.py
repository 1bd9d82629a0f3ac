"""Status of each error on HTTP and on gRPC."""

from __future__ import annotations

from typing import NamedTuple

import grpc

from chameleon_jax import errors


class Status(NamedTuple):
    http: int
    grpc: grpc.StatusCode


STATUSES: dict[type[Exception], Status] = {
    errors.DuplicateRequest: Status(400, grpc.StatusCode.ALREADY_EXISTS),  # also a ValueError, so it comes first
    ValueError: Status(400, grpc.StatusCode.INVALID_ARGUMENT),
    KeyError: Status(404, grpc.StatusCode.NOT_FOUND),
    errors.Unauthenticated: Status(401, grpc.StatusCode.UNAUTHENTICATED),
    errors.Forbidden: Status(403, grpc.StatusCode.PERMISSION_DENIED),
    errors.QueueFull: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    errors.Unavailable: Status(503, grpc.StatusCode.UNAVAILABLE),
    errors.DeadlineExceeded: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED),
    # 503, as another server may be able to serve it; not UNAVAILABLE, which clients retry: this server may well fail it again.
    errors.RequestFailed: Status(503, grpc.StatusCode.ABORTED),
}
"""Every error that callers are told of, the more specific kinds first."""

REPORTED_ERRORS = tuple(STATUSES)

RETRY_AFTER_S = 1
"""Pause that a caller is asked to make before it retries a request that was refused for now."""


def status_of(error: Exception) -> Status:
    """Status of an error of one of `REPORTED_ERRORS`."""
    return next(status for kind, status in STATUSES.items() if isinstance(error, kind))


def message_of(error: Exception) -> str:
    """Text of an error, without the quotes that `str` adds to the text of a KeyError."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
