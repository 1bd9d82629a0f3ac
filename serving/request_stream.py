"""A request as an asynchronous iterator. Only the last snapshot is kept: a slow reader gets more at once, nothing piles up."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import RequestFailed, ServingError
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import Delta, FinishReason, Logprob, RequestOutput
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.updates import logprobs_of, make_delta, make_output, prompt_logprobs_of


@dataclasses.dataclass(eq=False, repr=False)  # a prompt must not get into a log
class RequestStream:
    """Stream of one request's output, made by `AsyncLLM.open`.

    It belongs to the asyncio loop that made it. Leaving `async with` early aborts the request. After the last delta, iterating
    raises the error that ended the request where that is no finish reason: RequestFailed, DeadlineExceeded, Draining or
    EngineDead.

    Attributes:
        request_id: Id of the request.
        prompt: Prompt as text, where it came as text.
        prompt_token_ids: Prompt as token ids.
        lora: Adapter; None is the base model.
        tokenizer: Tokenizer of the model; None where it has none.
        give_up: Called when the stream is left, to abort the request unless it has ended.
        loop: The asyncio loop that it belongs to.
        request: Set by the engine's thread when it takes the request in.
        has_begun: Set by the engine's thread with the first token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    lora: LoRARequest | None
    tokenizer: Tokenizer | None
    give_up: Callable[[RequestStream], None]
    loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)
    request: Request | None = None
    has_begun: bool = False
    _latest: OutputSnapshot | None = None
    _read: OutputSnapshot | None = None  # the last that was read
    _logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)  # of the output that was read
    _prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    _error: ServingError | None = None
    _changed: asyncio.Future[None] | None = None
    _deadline: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Whether the engine has no more work for it."""
        return self._error is not None or (self._latest is not None and self._latest.finished)

    def deliver(self, snapshot: OutputSnapshot) -> None:
        """Take a later snapshot of the request."""
        if self.ended:
            return
        if snapshot.finished and snapshot.request.finish_reason is FinishReason.ERROR:
            self._error = RequestFailed(str(snapshot.request.stop_reason))
        else:
            self._latest = snapshot
        self._wake()

    def fail(self, error: ServingError) -> None:
        """End the stream with an error, behind the output so far. The request may go on; see `abort`."""
        if not self.ended:
            self._error = error
            self._wake()

    def abort(self, error: ServingError) -> None:
        """End the stream and the request with an error."""
        self.fail(error)
        self.give_up(self)

    def abort_at(self, deadline: Deadline) -> None:
        """Abort it at the deadline unless it has ended by then."""
        if deadline.at is not None and not self.ended:
            self._deadline = self.loop.call_at(deadline.at, lambda: self.abort(deadline.error()))

    def output(self) -> RequestOutput:
        """All output that was read so far."""
        assert self._read is not None, "nothing was read yet"
        found = logprobs_of(self._read.request, len(self._logprobs), self._read.num_tokens, self.tokenizer)
        self._logprobs += found or []
        logprobs = None if found is None else list(self._logprobs)
        return make_output(self._read, self.prompt, self.lora, logprobs, self.prompt_logprobs())

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Log-probabilities of the prompt's tokens, None at the first one. None where they were not requested.

        All are known when the first token is.
        """
        if self._prompt_logprobs is None and self.request is not None:
            self._prompt_logprobs = prompt_logprobs_of(self.request, self.tokenizer)
        return self._prompt_logprobs

    def close(self) -> None:
        """Abort the request unless it has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.give_up(self)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        while self._latest is self._read and self._error is None:
            if self._read is not None and self._read.finished:
                raise StopAsyncIteration
            self._changed = self.loop.create_future()
            await self._changed
        if self._latest is not self._read:
            assert self._latest is not None
            delta = make_delta(self._latest, self._read, self.tokenizer)
            self._read = self._latest
            return delta
        assert self._error is not None
        self.close()
        raise type(self._error)(*self._error.args)  # others may raise the same, and each adds its traceback

    def _wake(self) -> None:
        if self.ended and self._deadline is not None:
            self._deadline.cancel()
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
