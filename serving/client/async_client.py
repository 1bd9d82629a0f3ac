"""Client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import grpc

from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client.calls import BaseClient, Call, Generated, T, make_request
from chameleon_jax.serving.client.channel import Attempts
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages


class AsyncClient(BaseClient):
    """Client of a server's gRPC API for the asyncio loop in which it is made. Calls and errors are as for `Client`."""

    _grpc = grpc.aio

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
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
        return await self._call(self._calls.generate(request), self._attempts(timeout))

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lora_name: str | Mapping[str, float] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[Generated, None]:
        """Yield new output as it arrives. The last part has a finish reason.

        Closing the generator aborts the request: `async with contextlib.aclosing(client.stream(...)) as stream`.
        """
        call = self._calls.stream(make_request(prompt, params, lora_name, request_id, priority))
        attempts = self._attempts(timeout)
        while True:
            responses = self._start(call, attempts)
            try:
                async for response in responses:
                    attempts.commit()
                    yield call.read(response)
                return
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_or_raise(error))
            finally:
                responses.cancel()

    async def abort(self, request_id: str) -> bool:
        """Abort a request. Returns whether it was running."""
        return await self._call(self._calls.abort(request_id))

    async def load_lora(
        self, lora_name: str, source_path: str, pinned: bool | None = None, *, load_inplace: bool = True
    ) -> bool:
        """Load an adapter. Returns whether the name had the same content before. See `Client.load_lora`."""
        return await self._call(self._calls.load_lora(lora_name, source_path, pinned, load_inplace))

    async def unload_lora(self, lora_name: str) -> None:
        """Unload an adapter. Requests that use it finish; then its memory is freed. Raises KeyError."""
        attempts = self._attempts()
        with attempts.accept_missing():
            await self._call(self._calls.unload_lora(lora_name), attempts)

    async def list_loras(self) -> list[messages.Lora]:
        """List the adapters, with their tier of memory and their use."""
        return await self._call(self._calls.list_loras())

    async def get_load(self) -> messages.GetLoadResponse:
        """Get queue lengths, free pages and resident adapters."""
        return await self._call(self._calls.get_load())

    async def get_model_info(self) -> messages.GetModelInfoResponse:
        """Get the base model's name and limits."""
        return await self._call(self._calls.get_model_info())

    async def is_serving(self) -> bool:
        """Ask the health service whether the server takes requests."""
        return await self._call(self._calls.is_serving())

    async def _call(self, call: Call[T], attempts: Attempts | None = None) -> T:
        attempts = attempts or self._attempts()
        while True:
            try:
                return call.read(await self._start(call, attempts))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_or_raise(error))
