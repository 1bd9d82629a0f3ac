"""Channel to a server: its options and credentials, the errors of its calls, and when a call is retried."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

import grpc

from chameleon_jax.errors import QueueFull, ServingError
from chameleon_jax.serving.service.statuses import STATUSES

OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The default of 1 s is as long as all retries together. min_reconnect_backoff_ms keeps its default: it bounds the time that
    # one connection attempt may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # grpc's own retries would be invisible to `Attempts`
]

ERRORS = {status.grpc: kind for kind, status in STATUSES.items()}

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 5.0


def error_of(error: grpc.RpcError) -> Exception:
    """Exception that the server's Python API raises in the same case."""
    kind = ERRORS.get(error.code(), ServingError)
    if kind is QueueFull and _retry_after(error) is None:
        kind = ValueError  # RESOURCE_EXHAUSTED without a pause comes from grpc: a message is too large
    text = error.details() or error.code().name
    return kind(f"{error.code().name}: {text}" if kind is ServingError else text)


def _retry_after(error: grpc.RpcError) -> str | bytes | None:
    """Seconds, as the server sent them."""
    return dict(error.trailing_metadata() or ()).get("retry-after")


class Attempts:
    """Attempts of one call. A call is retried while the server is unavailable, until any of its answer has arrived.

    Args:
        retries: Attempts after the first.
        timeout: Seconds for all attempts together. None sets no limit.

    Attributes:
        again: Whether an attempt was made before. It may have succeeded, with its answer lost.
    """

    def __init__(self, retries: int, timeout: float | None):
        self.again = False
        self._left = retries
        self._end = None if timeout is None else time.monotonic() + timeout
        self._backoff = FIRST_BACKOFF_S

    @property
    def timeout(self) -> float | None:
        """Seconds left."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def commit(self) -> None:
        """Allow no further attempt, as part of the answer has been handed on."""
        self._left = 0

    def pause_or_raise(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt. Raises the error of the call where there is none."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE or self._left == 0:
            raise error_of(error) from error
        self._left -= 1
        self.again = True
        asked = _retry_after(error)
        pause = float(asked) if isinstance(asked, str) and asked.isdecimal() else self._backoff
        pause = min(pause, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
        self._backoff *= 2
        if self.timeout is not None and pause >= self.timeout:
            raise error_of(error) from error
        return pause

    @contextlib.contextmanager
    def accept_missing(self) -> Iterator[None]:
        """Ignore a KeyError of a repeated removal: an earlier attempt succeeded, and its answer was lost."""
        try:
            yield
        except KeyError:
            if not self.again:
                raise
