"""What both clients share: how a call is asked, what it answers, what its errors are, and when it is tried again."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from chameleon_jax.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    Forbidden,
    QueueFull,
    RequestFailed,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from chameleon_jax.outputs import Logprob
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import convert

OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A second otherwise, as long as all tries together. The min_ of it stays: it is the time that a connection may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # tries again by itself, without saying so
]

ERRORS: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ValueError,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.NOT_FOUND: KeyError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,  # where it says when to try again; otherwise a message is too large
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.ABORTED: RequestFailed,
}

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 5.0


@dataclasses.dataclass(frozen=True)
class Generated:
    """A whole answer, or what is new of one.

    Attributes:
        logprobs: one mapping for each of `token_ids`, the chosen token first; None: not asked for.
        finish_reason: "stop", "length" or "abort"; None: more follows, and what comes after this field is not known yet.
        stop_reason: the string or id that ended it.
        queue_s, first_token_s, total_s: seconds on the server, from arrival.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


def make_load(lora_name: str, source_path: str, pinned: bool | None, load_inplace: bool) -> messages.LoadLoraRequest:
    request = messages.LoadLoraRequest(lora_name=lora_name, source_path=source_path, load_inplace=load_inplace)
    if pinned is not None:
        request.pinned = pinned
    return request


def make_request(
    prompt: str | Sequence[int], params: SamplingParams | None, lora_name: str | None, request_id: str | None
) -> messages.GenerateRequest:
    """Raises ValueError where a value does not fit the message."""
    request = messages.GenerateRequest(lora_name=lora_name or "", request_id=request_id or "")
    if params is not None:
        request.sampling.CopyFrom(convert.sampling_to_message(params))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


def make_generated(response: messages.GenerateResponse | messages.GenerateStreamResponse) -> Generated:
    return Generated(
        request_id=response.request_id,
        text=response.text,
        token_ids=list(response.token_ids),
        logprobs=convert.logprobs_from_messages(response.logprobs),
        finish_reason=convert.FINISH_REASON_NAMES[response.finish_reason],
        stop_reason=convert.stop_reason_from_message(response.stop_reason),
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        queue_s=response.timing.queue,
        first_token_s=response.timing.first_token,
        total_s=response.timing.total,
    )


def error_of(error: grpc.RpcError) -> Exception:
    """The exception that the server's own Python API raises for the same."""
    kind = ERRORS.get(error.code(), ServingError)
    if kind is QueueFull and _retry_after(error) is None:
        kind = ValueError
    text = error.details() or error.code().name
    return kind(f"{error.code().name}: {text}" if kind is ServingError else text)


def _retry_after(error: grpc.RpcError) -> str | bytes | None:
    """Seconds, as the server said them."""
    return dict(error.trailing_metadata() or ()).get("retry-after")


def credentials(tls_ca: str | Path | None) -> grpc.ChannelCredentials:
    """Args: tls_ca: PEM file of who signed the server's certificate; None: the system's."""
    return grpc.ssl_channel_credentials(None if tls_ca is None else Path(tls_ca).read_bytes())


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


class Attempts:
    """How often and when a call is tried: again where the server was not available and nothing had come of it.

    Args:
        retries: tries after the first.
        timeout: seconds for all of them together; None: as long as it takes.

    Attributes:
        again: whether this is not the first try. What came of those before it is not known: an answer may have been lost.
    """

    def __init__(self, retries: int, timeout: float | None):
        self.again = False
        self._left = retries
        self._end = None if timeout is None else time.monotonic() + timeout
        self._backoff = FIRST_BACKOFF_S

    @property
    def timeout(self) -> float | None:
        """Seconds that are left."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def pause_after(self, error: grpc.RpcError) -> float | None:
        """Seconds to wait before the next try; None: there is none."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE or self._left == 0:
            return None
        self._left -= 1
        self.again = True
        said = _retry_after(error)
        pause = float(said) if isinstance(said, str) and said.isdecimal() else self._backoff
        pause = min(pause, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
        self._backoff *= 2
        return pause if self.timeout is None or pause < self.timeout else None
