"""Load of `bench serve`: requests sent when they are due, and the times of their tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from chameleon_jax.serving.cli.bench_client import HttpClient
from chameleon_jax.serving.cli.bench_workload import Workload


@dataclasses.dataclass
class Answer:
    """Streamed answer to one request, as it is received. Times are seconds of `time.perf_counter`.

    Attributes:
        started: Time at which the request was sent.
        first: Time of the first text; None before.
        last: Time of the latest text, or of its end.
        itl: Seconds between consecutive events with text.
        prompt_tokens: Tokens of the prompt: the server's count, or the number asked for where it sends none.
        output_tokens: Tokens of the output: the server's count, or the number of events where it sends none.
        text: Text of the answer.
        error: Reason why it failed; None where it did not.
    """

    prompt_tokens: int
    started: float = 0.0
    first: float | None = None
    last: float = 0.0
    itl: list[float] = dataclasses.field(default_factory=list)
    output_tokens: int = 0
    text: str = ""
    error: str | None = None
    _buffer: bytes = b""
    _counted: bool = False  # by the server

    def receive(self, status: int, data: bytes) -> None:
        """Take a part of the body."""
        now = time.perf_counter()
        self._buffer += data
        if status != 200:
            self.error = f"status {status}: {self._buffer.decode(errors='replace')[:500]}"
            return
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"{" in line:
                try:
                    self._take(json.loads(line[5:]), now)
                except (ValueError, TypeError, AttributeError, LookupError):
                    self.error = f"an event is {line[:200]!r}; allowed: a completion of OpenAI's API"

    def end(self, status: int) -> None:
        """Check that the answer is one."""
        if self.error is None and status != 200:
            self.error = f"status {status}"
        elif self.error is None and self.first is None:
            self.error = "the answer has no event with text or a finish reason; allowed: a stream of completions"

    def _take(self, event: Mapping[str, Any], now: float) -> None:
        if event.get("error"):
            self.error = str(event["error"])[:500]
        if usage := event.get("usage"):
            self.prompt_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self._counted = True
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
            if text:
                self._note_text(text, now)
            elif choice.get("finish_reason"):  # an event of a chat that has a role alone is no token
                self.first = self.first or now
                self.last = now

    def _note_text(self, text: str, now: float) -> None:
        if self.first is None:
            self.first = now
        else:
            self.itl.append(now - self.last)
        self.last = now
        self.text += text
        self.output_tokens += not self._counted


@dataclasses.dataclass(frozen=True)
class Load:
    """Sender of requests to one endpoint.

    Attributes:
        client: Client of the server.
        endpoint: Path; one that ends in `chat/completions` gets messages instead of prompts.
        fields: Further fields of every request.
        max_concurrency: Requests in flight at most. None sets no limit.
    """

    client: HttpClient
    endpoint: str
    fields: Mapping[str, Any]
    max_concurrency: int | None = None

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("chat/completions")

    async def run(self, workload: Workload, told: Callable[[], object] = lambda: None) -> tuple[list[Answer], float]:
        """Send every request when it is due. Returns the answers, and the seconds until the last.

        A request that waits for `max_concurrency` starts its times when it is sent.

        Args:
            workload: Requests.
            told: Called after each answer.
        """
        free = asyncio.Semaphore(self.max_concurrency or len(workload.prompts))
        bodies = [self._body(workload, i) for i in range(len(workload.prompts))]
        begin = time.perf_counter()

        async def send(i: int) -> Answer:
            async with free:
                answer = await self._ask(bodies[i], workload.input_lens[i])
            told()
            return answer

        tasks = []
        async with asyncio.TaskGroup() as group:
            for i, due in enumerate(workload.arrival_s):
                if (pause := begin + due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                tasks.append(group.create_task(send(i)))
        return [task.result() for task in tasks], time.perf_counter() - begin

    async def try_first(self, workload: Workload) -> None:
        """Send the first request alone. Raises ValueError with the reason where it fails."""
        answer = await self._ask(self._body(workload, 0), workload.input_lens[0])
        if answer.error is not None:
            raise ValueError(f"the first request failed: {answer.error}")

    async def _ask(self, body: bytes, input_len: int) -> Answer:
        answer = Answer(input_len, started=time.perf_counter())
        try:
            answer.end(await self.client.request("POST", self.endpoint, body, answer.receive))
        except OSError as error:
            answer.error = str(error) or type(error).__name__
        return answer

    def _body(self, workload: Workload, i: int) -> bytes:
        prompt = workload.prompts[i]
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        common = {"model": workload.models[i], "max_tokens": workload.output_lens[i], "stream": True}
        return json.dumps({**asked, **common, "stream_options": {"include_usage": True}, **self.fields}).encode()
