"""One request as an asynchronous iterator. Only the last update is kept: a slow reader gets more at once, nothing piles up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import RequestFailed, ServingError
from chameleon_jax.outputs import FinishReason, Logprob, RequestOutput
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.updates import Delta, Update, logprobs_of, make_delta, make_output


class RequestStream:
    """Made by `AsyncLLM.open`; belongs to the asyncio loop that made it. `async with` gives the request up when left early.

    Iterating raises what ended the request where that is no finish reason, after what came before: RequestFailed,
    DeadlineExceeded, Draining, EngineDead.

    Attributes:
        prompt_token_ids: what the prompt is to the model.
        request: set by the engine's thread when it takes the request in.
        has_begun: set by the engine's thread with the first token.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        lora: LoRARequest | None,
        tokenizer: Tokenizer | None,
        give_up: Callable[[RequestStream], None],
    ):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.loop = asyncio.get_running_loop()
        self.request: Request | None = None
        self.has_begun = False
        self._prompt = prompt
        self._lora = lora
        self._tokenizer = tokenizer
        self._give_up = give_up
        self._update: Update | None = None  # the last
        self._read: Update | None = None  # the last that was read
        self._logprobs: list[dict[int, Logprob]] = []  # of the last output
        self._error: ServingError | None = None
        self._news: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Whether the engine does nothing more for it."""
        return self._error is not None or (self._update is not None and self._update.finished)

    def deliver(self, update: Update) -> None:
        if self.ended:
            return
        if update.finished and update.request.finish_reason is FinishReason.ERROR:
            self._error = RequestFailed(str(update.request.stop_reason))
        else:
            self._update = update
        self._wake()

    def fail(self, error: ServingError) -> None:
        """Ends it with an error, once what came before is read. The request may still run: see `abort`."""
        if not self.ended:
            self._error = error
            self._wake()

    def abort(self, error: ServingError) -> None:
        """Ends it, and the request, with an error."""
        self.fail(error)
        self._give_up(self)

    def abort_at(self, deadline: Deadline) -> None:
        """Aborts it unless it has ended by then."""
        if deadline.at is not None and not self.ended:
            self._deadline = self.loop.call_at(deadline.at, lambda: self.abort(deadline.error()))

    def output(self) -> RequestOutput:
        """Everything that was read so far."""
        assert self._read is not None, "nothing was read yet"
        found = logprobs_of(self._read.request, len(self._logprobs), self._read.num_tokens, self._tokenizer)
        self._logprobs += found or []
        return make_output(self._read, self._prompt, self._lora, None if found is None else list(self._logprobs))

    def close(self) -> None:
        """Gives the request up unless it has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._give_up(self)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        while self._update is self._read and self._error is None:
            if self._read is not None and self._read.finished:
                raise StopAsyncIteration
            self._news = self.loop.create_future()
            await self._news
        if self._update is not self._read:
            assert self._update is not None
            delta = make_delta(self._update, self._read, self._tokenizer)
            self._read = self._update
            return delta
        assert self._error is not None
        self.close()
        raise type(self._error)(*self._error.args)  # others may raise the same, and each adds its traceback

    def _wake(self) -> None:
        if self.ended and self._deadline is not None:
            self._deadline.cancel()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
