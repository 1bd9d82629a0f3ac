"""Client for ordinary Python."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import grpc

from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client.calls import BaseClient, Call, Generated, T, make_request
from chameleon_jax.serving.client.channel import Attempts
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages


class Client(BaseClient):
    """Client of a server's gRPC API. Thread-safe.

    Calls raise the errors of the server's Python API: ValueError, KeyError, and the errors of `chameleon_jax.errors`, of which
    `Unavailable` means that the server cannot be reached, is about to stop, or is dead.
    """

    _grpc = grpc

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
        lora_name: str | Mapping[str, float] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Generated:
        """Complete one prompt, given as text or as token ids.

        Args:
            prompt: Text, or token ids.
            params: Sampling parameters; None takes the server's defaults.
            lora_name: An adapter, or several with their weights; None is the base model.
            request_id: Id that no unfinished request has; None lets the server make one.
            priority: Class of the request, a signed 64-bit integer. Lower ones start first.
            timeout: Seconds for the call; None takes the client's own.
        """
        request = make_request(prompt, params, lora_name, request_id, priority)
        return self._call(self._calls.generate(request), self._attempts(timeout))

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lora_name: str | Mapping[str, float] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Generated]:
        """Yield new output as it arrives. The last part has a finish reason. Leaving the iteration aborts the request."""
        call = self._calls.stream(make_request(prompt, params, lora_name, request_id, priority))
        attempts = self._attempts(timeout)
        while True:
            responses = self._start(call, attempts)
            try:
                for response in responses:
                    attempts.commit()
                    yield call.read(response)
                return
            except grpc.RpcError as error:
                time.sleep(attempts.pause_or_raise(error))
            finally:
                responses.cancel()

    def abort(self, request_id: str) -> bool:
        """Abort a request. Returns whether it was running."""
        return self._call(self._calls.abort(request_id))

    def load_lora(self, lora_name: str, source_path: str, pinned: bool | None = None, *, load_inplace: bool = True) -> bool:
        """Load an adapter. Returns whether the name had the same content before.

        Args:
            lora_name: Name for requests.
            source_path: Path below one of the server's adapter directories, or a hub id that it allows.
            pinned: Whether to keep it on the device. None keeps the name's setting, which for a new name is False.
            load_inplace: False refuses new content for an existing name.
        """
        return self._call(self._calls.load_lora(lora_name, source_path, pinned, load_inplace))

    def unload_lora(self, lora_name: str) -> None:
        """Unload an adapter. Requests that use it finish; then its memory is freed. Raises KeyError."""
        attempts = self._attempts()
        with attempts.accept_missing():
            self._call(self._calls.unload_lora(lora_name), attempts)

    def list_loras(self) -> list[messages.Lora]:
        """List the adapters, with their tier of memory and their use."""
        return self._call(self._calls.list_loras())

    def get_load(self) -> messages.GetLoadResponse:
        """Get queue lengths, free pages and resident adapters."""
        return self._call(self._calls.get_load())

    def get_model_info(self) -> messages.GetModelInfoResponse:
        """Get the base model's name and limits."""
        return self._call(self._calls.get_model_info())

    def is_serving(self) -> bool:
        """Ask the health service whether the server takes requests."""
        return self._call(self._calls.is_serving())

    def _call(self, call: Call[T], attempts: Attempts | None = None) -> T:
        attempts = attempts or self._attempts()
        while True:
            try:
                return call.read(self._start(call, attempts))
            except grpc.RpcError as error:
                time.sleep(attempts.pause_or_raise(error))
