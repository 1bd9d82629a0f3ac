"""Engine whose loop can be started anew, with outputs whose lengths the benchmark sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.simulator.simulate import STOP, TOKEN
from chameleon_jax.executor import SampledToken
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.scheduler.length_predictor import LengthPredictor
from chameleon_jax.serving.engine import Engine
from chameleon_jax.systems import System, get_system

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


class BenchmarkEngine(Engine):
    """Engine whose weights, programs and adapters in host memory outlive the loop."""

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
                self.store.put(info.content_hash, self.device.stage(block.copy()))
                self._placements[info.content_hash] = placement
                self.names.set(f"adapter-{i}", info)

    def restart(
        self,
        system: str | System,
        clock: Callable[[], float],
        *,
        lengths: dict[str, int],
        predictor: LengthPredictor | None,
        executor: type[EndingExecutor] = EndingExecutor,
        **settings: Any,
    ) -> None:
        """Start a new loop, of another system, with an empty pool and cache and the same registered adapters.

        `lengths` has the output tokens of the requests to come, by id. A `predictor` of None is the loop's own. `settings` are
        fields of `EngineConfig` that differ, within the compiled sizes.

        Raises:
            RuntimeError: Requests are unfinished.
        """
        if self.loop.has_unfinished:
            raise RuntimeError("requests are unfinished")
        config = dataclasses.replace(self.config, system=system, **settings)
        ending = executor(self.device, self.store, self._placements, get_system(system).transfers_per_load)
        ending.lengths = lengths
        self.loop = ServingLoop(
            config,
            ending,
            PagePool(self.num_pages),
            page_tokens=self.layout.page_tokens,
            max_model_len=self.max_model_len,
            shapes=self.device.buckets.prefill_shapes,
            clock=clock,
            predictor=predictor,
            forget=self._forget,
        )
        self.names.loop, self._executor = self.loop, ending
        for name in self.registry.names():
            self.loop.add_adapter(self.names.named(name))

    def submit_drawn(self, request_id: str, prompt: Sequence[int], max_tokens: int, adapter: int, arrival: float) -> Request:
        """Submit a greedy request that ends at the length given to `restart`."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=(STOP,), ignore_eos=True)
        return self.submit(prompt, params, LoRARequest(f"adapter-{adapter}"), request_id, arrival)
