"""Calls of the API: requests made from Python values, and responses read back. The same for both clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chameleon_jax.outputs import Logprob
from chameleon_jax.request import check_priority
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client import channel
from chameleon_jax.serving.client.channel import Attempts
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc import convert

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Generated:
    """Answer to a prompt, whole or one part of a stream.

    Attributes:
        logprobs: One mapping for each of `token_ids`, the chosen token first. None where they were not requested.
        finish_reason: "stop", "length" or "abort". None in all parts but the last; the fields below are set only in the last.
        stop_reason: Stop string or token id that ended the answer.
        queue_s: Seconds on the server from arrival until it started.
        first_token_s: Seconds on the server from arrival to the first token.
        total_s: Seconds on the server from arrival to the end.
        prompt_logprobs: One mapping for each token of the prompt, the token itself first; None at the first token. None where
            they were not requested.
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
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclasses.dataclass(frozen=True)
class Call(Generic[T]):
    """One call: a method of a stub, its request, and how a response is read."""

    method: Callable[..., Any]
    request: Any
    read: Callable[[Any], T]


class Calls:
    """Calls over one channel, which may be of `grpc` or of `grpc.aio`."""

    def __init__(self, channel: Any):
        self._inference = stubs.InferenceStub(channel)
        self._control = stubs.ControlStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    def generate(self, request: messages.GenerateRequest) -> Call[Generated]:
        return Call(self._inference.Generate, request, make_generated)

    def stream(self, request: messages.GenerateRequest) -> Call[Generated]:
        return Call(self._inference.GenerateStream, request, make_generated)

    def abort(self, request_id: str) -> Call[bool]:
        return Call(self._control.Abort, messages.AbortRequest(request_id=request_id), lambda response: bool(response.aborted))

    def load_lora(self, lora_name: str, source_path: str, pinned: bool | None, load_inplace: bool) -> Call[bool]:
        request = messages.LoadLoraRequest(lora_name=lora_name, source_path=source_path, load_inplace=load_inplace)
        if pinned is not None:
            request.pinned = pinned
        return Call(self._control.LoadLora, request, lambda response: bool(response.already_loaded))

    def unload_lora(self, lora_name: str) -> Call[None]:
        return Call(self._control.UnloadLora, messages.UnloadLoraRequest(lora_name=lora_name), lambda response: None)

    def list_loras(self) -> Call[list[messages.Lora]]:
        return Call(self._control.ListLoras, messages.ListLorasRequest(), lambda response: list(response.loras))

    def get_load(self) -> Call[messages.GetLoadResponse]:
        return Call(self._control.GetLoad, messages.GetLoadRequest(), lambda response: response)

    def get_model_info(self) -> Call[messages.GetModelInfoResponse]:
        return Call(self._control.GetModelInfo, messages.GetModelInfoRequest(), lambda response: response)

    def is_serving(self) -> Call[bool]:
        serving = health_pb2.HealthCheckResponse.SERVING
        return Call(self._health.Check, health_pb2.HealthCheckRequest(), lambda response: bool(response.status == serving))


class BaseClient:
    """Connection and settings of a client."""

    _grpc: ClassVar[Any]
    """`grpc` or `grpc.aio`: the module that makes the channel."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        tls: bool | str | Path = False,
        timeout: float | None = None,
        retries: int = 3,
    ):
        """Connect when the first call is made.

        Args:
            target: host:port of the server.
            api_key: Key sent with every call.
            tls: Whether the server uses TLS. A path names a PEM file of the authority that signed its certificate.
            timeout: Seconds for each call that sets no timeout of its own. None sets no limit.
            retries: Further attempts of a call to which the server was unavailable.
        """
        if tls is False:
            self._channel = self._grpc.insecure_channel(target, channel.OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(None if tls is True else Path(tls).read_bytes())
            self._channel = self._grpc.secure_channel(target, credentials, channel.OPTIONS)
        self._calls = Calls(self._channel)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._timeout, self._retries = timeout, retries

    def _attempts(self, timeout: float | None = None) -> Attempts:
        return Attempts(self._retries, self._timeout if timeout is None else timeout)

    def _start(self, call: Call[T], attempts: Attempts) -> Any:
        """Start one attempt of a call. Returns grpc's response, awaitable or iterator of responses."""
        return call.method(call.request, timeout=attempts.timeout, metadata=self._metadata)


def make_request(
    prompt: str | Sequence[int],
    params: SamplingParams | None,
    lora_name: str | Mapping[str, float] | None,
    request_id: str | None,
    priority: int = 0,
) -> messages.GenerateRequest:
    """Make the request of `Generate` and `GenerateStream`. Raises ValueError for a value that does not fit its field."""
    request = messages.GenerateRequest(request_id=request_id or "", priority=check_priority(priority))
    if isinstance(lora_name, Mapping):
        request.loras.extend(messages.LoraWeight(lora_name=name, weight=weight) for name, weight in lora_name.items())
    elif lora_name is not None:
        request.lora_name = lora_name
    if params is not None:
        request.sampling.CopyFrom(convert.sampling_to_message(params))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


def make_generated(response: messages.GenerateResponse | messages.GenerateStreamResponse) -> Generated:
    of_prompt = convert.logprobs_from_messages(response.prompt_logprobs)
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
        prompt_logprobs=None if of_prompt is None else [position or None for position in of_prompt],
    )
