"""Engine with random adapters, and outputs whose lengths the benchmark sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.simulator.simulate import STOP, TOKEN
from chameleon_jax.executor import SampledToken
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine

ATTENTION = TARGETS[:4]
"""Targets of the paper's adapters."""


class EndingExecutor(JaxExecutor):
    """Executor that ends each output at a length that only the benchmark knows.

    The token at that length becomes STOP, and no token before it is STOP.

    Attributes:
        lengths: Request id to output tokens.
    """

    lengths: dict[str, int]

    def collect(self, handle: Any) -> list[SampledToken]:
        return [self._end(token) for token in super().collect(handle)]

    def _end(self, token: SampledToken) -> SampledToken:
        request = token.request
        if len(request.output_token_ids) + 1 >= self.lengths[request.request_id]:
            return token._replace(token_id=STOP)
        return token._replace(token_id=TOKEN) if token.token_id == STOP else token


class BenchmarkEngine(LLMEngine):
    """Engine with random adapters, whose requests end at lengths that the benchmark sets."""

    _executor: EndingExecutor

    def _make_executor(self) -> EndingExecutor:
        return EndingExecutor(self.runner, self.store)

    def add_random_loras(self, ranks: Sequence[int], seed: int = 0) -> None:
        """Register adapters named `adapter-i`, of rank ranks[i] on q, k, v and o.

        Adapters of one rank have the same random values, each in memory of its own: packing hundreds of large adapters takes
        minutes, and nothing measured depends on their values.
        """
        rng = np.random.default_rng(seed)
        for rank in dict.fromkeys(ranks):
            placement = self.layout.place(dict.fromkeys(ATTENTION, rank))
            shape = (self.model_config.num_layers, placement.num_pages, self.layout.page_elems)
            block = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(self.dtype)
            num_bytes = placement.num_pages * self.layout.page_bytes(self.dtype.itemsize)
            for i in [i for i, other in enumerate(ranks) if other == rank]:
                info = AdapterInfo(f"adapter-{i}-of-rank-{rank}", rank, placement.num_pages, num_bytes)
                self._executor.add(info.content_hash, placement, self.runner.stage(block.copy()))
                self.adapters.add(f"adapter-{i}", info)

    def start_run(self, lengths: dict[str, int], **settings: Any) -> None:
        """Restart for requests of these output lengths, by id; for `settings` see `restart`.

        Raises:
            RuntimeError: Requests are unfinished.
        """
        if self.loop.has_unfinished:
            raise RuntimeError("requests are unfinished")
        self._executor.lengths = lengths
        self.restart(**settings)

    def submit_drawn(self, request_id: str, prompt: Sequence[int], max_tokens: int, adapter: int, arrival: float) -> Request:
        """Submit a greedy request that ends at the length given to `start_run`."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=(STOP,), ignore_eos=True)
        return self.submit(prompt, params, LoRARequest(f"adapter-{adapter}"), request_id, arrival)
