"""Loops over a `FakeExecutor`, and requests for them."""

from __future__ import annotations

from chameleon_jax.config import EngineConfig
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from tests.chameleon_jax.fake_executor import FakeExecutor

PAGE_TOKENS = 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def make_loop(num_pages: int, load_polls: int = 1, **settings) -> tuple[ServingLoop, FakeExecutor, list[str]]:
    executor = FakeExecutor(PAGE_TOKENS, load_polls)
    forgotten: list[str] = []
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "predicted_output_len": 3, "system": "fifo"}
    loop = ServingLoop(
        EngineConfig(**(defaults | settings)),
        executor,
        num_pages,
        page_tokens=PAGE_TOKENS,
        max_model_len=80,
        clock=Clock(),
    )
    executor.forget = forgotten.append  # type: ignore[method-assign]
    return loop, executor, forgotten


def adapter(name: str, pages: int) -> AdapterInfo:
    return AdapterInfo(content_hash=name, rank=8, num_pages=pages, num_bytes=pages)


def make_request(number: int, prompt: int, output: int, adapter: str | None = None, **fields) -> Request:
    tokens = [(number * 7 + i) % 50 for i in range(prompt)]
    params = SamplingParams(max_tokens=output, **fields)
    stop_ids = frozenset(params.stop_token_ids)
    return Request(f"r{number}", tokens, params, arrival_time=float(number), seed=0, stop_ids=stop_ids, adapter=adapter)


def expected(executor: FakeExecutor, request: Request) -> list[int]:
    out: list[int] = []
    while len(out) < request.params.max_tokens:
        out.append(executor.next_token(request.prompt_token_ids + out, request.adapter))
        if out[-1] in request.stop_ids:
            break
    return out


def run(loop: ServingLoop, limit: int = 5000) -> None:
    for _ in range(limit):
        if not loop.has_unfinished:
            return
        loop.step()
    raise AssertionError("the loop does not end")
