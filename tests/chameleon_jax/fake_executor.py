"""An executor that computes nothing but remembers what the device would: every page's content, checked at every read."""

from __future__ import annotations

import dataclasses
import zlib

from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.request import Request
from chameleon_jax.scheduler import StepPlan


class FakeGuide:
    """Grammar that allows every token, and remembers the ones that it has gone past.

    Attributes:
        last: Token behind which nothing can follow.
    """

    error = None

    def __init__(self, last: int | None = None):
        self.seen: list[int] = []
        self.last = last

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)

    @property
    def complete(self) -> bool:
        return self.last is not None and self.seen[-1:] == [self.last]


@dataclasses.dataclass
class Drawing:
    """A token to draw behind the first `length` ones of a request. `token` is None until it is drawn."""

    request: Request
    length: int
    token: int | None = None


class FakeExecutor:
    """Tokens depend on the sequence so far and the adapter alone, and are computed from what the pages hold.

    Guided tokens are drawn by `draw`, which checks that their guide has gone past all tokens before.
    """

    def __init__(self, page_tokens: int, load_polls: int = 1, vocab: int = 50):
        self.page_tokens = page_tokens
        self.load_polls = load_polls
        self.vocab = vocab
        self.memory: dict[int, object] = {}  # page -> {place: token} as KV, ("adapter", hash, i) as adapter
        self.slots: dict[int, int] = {}
        self.adapter_pages: dict[str, list[int]] = {}
        self.loads: dict[str, tuple[int, list[int]]] = {}
        self.failing: set[str] = set()
        self.cache: AdapterCache | None = None

    num_compiled: int | None = 0

    def next_token(self, tokens: list[int], adapter: str | None) -> int:
        return zlib.crc32(repr((tokens, adapter)).encode()) % self.vocab

    def dispatch(self, plan: StepPlan) -> list[Drawing]:
        drawings = []
        for chunk in plan.prefills:
            request = chunk.request
            self._check_adapter(request.adapter)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self._write(request.pages, position, request.token(position))
            if chunk.samples:
                drawings.append(Drawing(request, chunk.start + chunk.num_tokens))
        for request in plan.decodes:
            self._check_adapter(request.adapter)
            self._write(request.pages, request.num_computed - 1, self.slots[request.slot])
            drawings.append(Drawing(request, request.num_computed))
        for drawing in drawings:
            if drawing.request.guide is None:
                drawing.token = self._sample(drawing.request, drawing.length)
        return drawings

    def draw(self, handle: list[Drawing]) -> None:
        for drawing in handle:
            request, guide = drawing.request, drawing.request.guide
            if drawing.token is not None:
                continue
            if request.finish_reason is not None:
                drawing.token = -1
                continue
            assert isinstance(guide, FakeGuide) and guide.seen == request.output_token_ids
            assert request.num_known == drawing.length
            drawing.token = self._sample(request, drawing.length)

    def collect(self, handle: list[Drawing]) -> list[SampledToken]:
        assert all(drawing.token is not None for drawing in handle)
        return [SampledToken(drawing.request, drawing.token) for drawing in handle]

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        assert content_hash not in self.loads
        self.loads[content_hash] = (self.load_polls, list(pages))

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        ended = []
        for content_hash, (polls, pages) in list(self.loads.items()):
            if polls > 0 and not wait:
                self.loads[content_hash] = (polls - 1, pages)
                continue
            del self.loads[content_hash]
            if content_hash in self.failing:
                ended.append(LoadResult(content_hash, OSError("gone")))
                continue
            for i, page in enumerate(pages):
                self.memory[page] = ("adapter", content_hash, i)
            self.adapter_pages[content_hash] = pages
            ended.append(LoadResult(content_hash))
        return ended

    def cancel_load(self, content_hash: str) -> None:
        del self.loads[content_hash]

    def forget(self, content_hash: str) -> None:
        pass

    def reset(self) -> None:
        self.loads.clear()
        self.memory.clear()
        self.slots.clear()
        self.adapter_pages.clear()

    def _sample(self, request, length: int) -> int:
        tokens = []
        for position in range(length):
            page = self.memory[request.pages[position // self.page_tokens]]
            assert isinstance(page, dict), f"page of {request.request_id} was overwritten by {page}"
            tokens.append(page[position % self.page_tokens])
        token = self.next_token(tokens, request.adapter)
        self.slots[request.slot] = token
        return token

    def _write(self, pages: list[int], position: int, token: int) -> None:
        page = pages[position // self.page_tokens]
        assert page != 0
        if position % self.page_tokens == 0 or not isinstance(self.memory.get(page), dict):
            self.memory[page] = {}
        self.memory[page][position % self.page_tokens] = token  # type: ignore[index]

    def _check_adapter(self, content_hash: str | None) -> None:
        if content_hash is not None:
            for i, page in enumerate(self.adapter_pages[content_hash]):
                assert self.memory[page] == ("adapter", content_hash, i)
