"""The client for ordinary Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client import channel
from chameleon_jax.serving.client.channel import Attempts, Generated
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs


class Client:
    """Thread-safe.

    Args:
        target: host:port.
        api_key: sent with every call.
        tls: whether the server has TLS; with a path, that of a PEM file of who signed its certificate.
        timeout: seconds for each call that names none; None: as long as it takes.
        retries: further tries of a call to which the server was not available.

    Calls raise what the Python API of the server does: ValueError, KeyError, and the errors of `serving.errors`, of which
    `Unavailable` says that the server cannot be reached, is about to stop, or is dead.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        tls: bool | str | Path = False,
        timeout: float | None = None,
        retries: int = 3,
    ):
        if tls is False:
            self._channel = grpc.insecure_channel(target, channel.OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, channel.credentials(None if tls is True else tls), channel.OPTIONS)
        self._inference = stubs.InferenceStub(self._channel)
        self._control = stubs.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = channel.metadata(api_key)
        self._timeout, self._retries = timeout, retries

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Generated:
        """Completes one prompt, given as text or as token ids."""
        request = channel.make_request(prompt, params, lora_name, request_id)
        return channel.make_generated(self._call(self._inference.Generate, request, self._attempts(timeout)))

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Generated]:
        """Yields what is new, as it comes; the last has a finish reason. Leaving the iteration ends the request."""
        request = channel.make_request(prompt, params, lora_name, request_id)
        attempts = self._attempts(timeout)
        begun = False
        while True:
            call = self._inference.GenerateStream(request, timeout=attempts.timeout, metadata=self._metadata)
            try:
                for response in call:
                    begun = True
                    yield channel.make_generated(response)
                return
            except grpc.RpcError as error:
                pause = None if begun else attempts.pause_after(error)
                if pause is None:
                    raise channel.error_of(error) from error
                time.sleep(pause)
            finally:
                call.cancel()

    def abort(self, request_id: str) -> bool:
        """Ends a request; whether there was one."""
        response: messages.AbortResponse = self._call(self._control.Abort, messages.AbortRequest(request_id=request_id))
        return response.aborted

    def load_lora(self, lora_name: str, source_path: str, pinned: bool | None = None, *, load_inplace: bool = True) -> bool:
        """Returns whether the name had that very content already.

        Args:
            pinned: whether the name keeps it on the device; None: as before, and a new name does not.
            load_inplace: False refuses other content for a name that exists.
        """
        request = channel.make_load(lora_name, source_path, pinned, load_inplace)
        response: messages.LoadLoraResponse = self._call(self._control.LoadLora, request)
        return response.already_loaded

    def unload_lora(self, lora_name: str) -> None:
        attempts = self._attempts()
        try:
            self._call(self._control.UnloadLora, messages.UnloadLoraRequest(lora_name=lora_name), attempts)
        except KeyError:
            if not attempts.again:  # otherwise an earlier try has unloaded it
                raise

    def list_loras(self) -> list[messages.Lora]:
        response: messages.ListLorasResponse = self._call(self._control.ListLoras, messages.ListLorasRequest())
        return list(response.loras)

    def get_load(self) -> messages.GetLoadResponse:
        response: messages.GetLoadResponse = self._call(self._control.GetLoad, messages.GetLoadRequest())
        return response

    def get_model_info(self) -> messages.GetModelInfoResponse:
        response: messages.GetModelInfoResponse = self._call(self._control.GetModelInfo, messages.GetModelInfoRequest())
        return response

    def is_serving(self) -> bool:
        """What the health service says."""
        response = self._call(self._health.Check, health_pb2.HealthCheckRequest())
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def _attempts(self, timeout: float | None = None) -> Attempts:
        return Attempts(self._retries, self._timeout if timeout is None else timeout)

    def _call(self, method: Callable[..., Any], request: Any, attempts: Attempts | None = None) -> Any:
        attempts = attempts or self._attempts()
        while True:
            try:
                return method(request, timeout=attempts.timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
                if pause is None:
                    raise channel.error_of(error) from error
                time.sleep(pause)
