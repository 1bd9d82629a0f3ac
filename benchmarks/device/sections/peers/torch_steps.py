"""Steps of the torch model, captured as CUDA graphs and timed as this project's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device.scale import Scale
from benchmarks.device.sections.peers.torch_llama import PLAIN, Adapters, Pieces, TorchLlama, compiled_pieces, random_weights
from benchmarks.device.timing import Timing, best_of, time_calls

TORCHS_CHOICE = "torch's choice"
GPU_ATTENTION = ("flash", "cudnn", "efficient")
"""Backends of `scaled_dot_product_attention`."""
COMPILE_SECONDS = 60.0
"""Limit for all calls of torch.compile together."""
SPARE_BYTES = 3 << 29
"""Device memory to spare beside weights and KV cache."""
SCALE_OF_KV = 0.02


class Pending:
    """Pending work of a call, for which `jax.block_until_ready`, and with it `time_calls`, waits."""

    def block_until_ready(self) -> None:
        synchronize()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Step:
    """Step over static tensors, greedy tokens included; a CUDA graph on a GPU.

    Args:
        tokens: `[rows, tokens]`. One token a row is replaced by the step's choice, so that replays follow one another.

    Attributes:
        logits: `[rows, vocab]` of the last run.
    """

    def __init__(
        self,
        model: TorchLlama,
        tokens: torch.Tensor,
        start: int,
        cache: torch.Tensor,
        attention: str,
        pieces: Pieces,
        adapters: Adapters | None = None,
    ):
        self.logits: torch.Tensor
        self._adapters = adapters
        self._model, self._start, self._cache, self._pieces = model, start, cache, pieces
        self._tokens, self._next = tokens, tokens[:, -1:] if tokens.shape[1] == 1 else tokens[:, -1:].clone()
        self._attention = attention
        self._graph: Any = None
        if tokens.is_cuda:
            self._capture()

    @torch.inference_mode()
    def run(self) -> Pending:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        return Pending()

    @torch.inference_mode()
    def _capture(self) -> None:
        """Capture the graph after a warm-up on a stream of its own, as capture requires; the tokens stay the same."""
        before = self._tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        self._tokens.copy_(before)

    def _step(self) -> None:
        with contextlib.nullcontext() if self._attention == TORCHS_CHOICE else sdpa_kernel(_backend(self._attention)):
            self.logits = self._model.logits(self._tokens, self._start, self._cache, self._pieces, self._adapters)
        self._next.copy_(self.logits.argmax(-1, keepdim=True))


@functools.cache
def ceilings(scale: Scale) -> dict[str, float]:
    """Ceilings of the section `machine` as torch measures them, for a report that lacks them."""
    x = torch.rand(scale.copy_bytes // 4, device=device())
    n = scale.matrix
    a, b = torch.randn(2, n, n, device=device(), dtype=getattr(torch, scale.dtype))
    with torch.inference_mode():
        return {
            "copy": 2 * x.nbytes / best_of(lambda: _pending(x + 1)),
            "matrix": 2 * n**3 / best_of(lambda: _pending(a @ b)),
        }


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurement of one way to run a step.

    Attributes:
        timing: Its time. None if there is none, for the reason in `note`.
        attention: The fastest backend, which it used.
    """

    variant: str
    timing: Timing | None
    attention: str = ""
    note: str = ""


class TorchBench:
    """Model with random weights, and steps to time.

    Args:
        token_bytes: KV bytes of a token, all layers.
    """

    def __init__(self, scale: Scale, token_bytes: int):
        self._scale, self._token_bytes = scale, token_bytes
        if not torch.cuda.is_available():
            # On a busy CPU, threads of tiny products waited for one another: 300 ms a step instead of 1.
            torch.set_num_threads(1)
        weights = random_weights(scale.config, getattr(torch, scale.dtype), device())
        self.model = TorchLlama(scale.config, weights, max(scale.prompt_tokens, *scale.contexts))
        self._best: dict[tuple[int, int, int], tuple[str, Pieces]] = {}
        self._pieces: Pieces | None = None
        self._compile_seconds = 0.0
        self._compile_error = ""

    def decode(self, rows: int, context: int) -> list[Measured]:
        """Measure one token for each of `rows` sequences, which then have `context` tokens."""
        lacking = self.lacking(rows * context)
        if lacking:
            return [Measured("torch", None, note=lacking)]
        tokens = torch.randint(self._scale.config.vocab_size, (rows, 1), device=device())
        return self._timed(tokens, context - 1)

    def prefill(self, tokens: int) -> list[Measured]:
        """Measure one prompt."""
        free_memory()
        words = torch.randint(self._scale.config.vocab_size, (1, tokens), device=device())
        return self._timed(words, 0)

    def cache(self, rows: int, context: int) -> torch.Tensor:
        return self.model.cache(rows, context).normal_(std=SCALE_OF_KV)

    def best(self, tokens: torch.Tensor, start: int, cache: torch.Tensor) -> tuple[str, Pieces]:
        """Attention and pieces of the fastest step without adapters; pieces are plain if none was timed before."""
        known = self._best.get((*tokens.shape, start))
        return known or (self._attention(tokens, start, cache), PLAIN)

    def lacking(self, kv_tokens: int, adapter_bytes: int = 0) -> str:
        """Reason why KV and adapters do not fit the memory, empty if they do."""
        free_memory()
        if not torch.cuda.is_available():
            return ""
        return lacking_text(kv_tokens * self._token_bytes, adapter_bytes, torch.cuda.mem_get_info()[0] - SPARE_BYTES)

    def _step(self, tokens: torch.Tensor, start: int, cache: torch.Tensor, attention: str, pieces: Pieces) -> Step:
        return Step(self.model, tokens.clone(), start, cache, attention, pieces)

    def _attention(self, tokens: torch.Tensor, start: int, cache: torch.Tensor) -> str:
        if not tokens.is_cuda:
            return TORCHS_CHOICE
        return fastest(lambda attention: self._step(tokens, start, cache, attention, PLAIN))

    def _timed(self, tokens: torch.Tensor, start: int) -> list[Measured]:
        rows, length = tokens.shape
        name = "torch, CUDA graph" if tokens.is_cuda else "torch, plain calls (no GPU: no CUDA graph)"
        try:
            cache = self.cache(rows, start + length)
            attention = self._attention(tokens, start, cache)
            timing = time_calls(self._step(tokens, start, cache, attention, PLAIN).run)
            found = [Measured(name, timing, attention)]
            self._best[rows, length, start] = attention, PLAIN
            if not tokens.is_cuda:
                return found
            compiled = self._compiled(lambda pieces: self._step(tokens, start, cache, attention, pieces))
            if isinstance(compiled, str):
                return [*found, Measured("torch, element-wise compiled", None, note=compiled)]
            compiled_timing = time_calls(compiled.run)
            if compiled_timing.seconds < timing.seconds and self._pieces:
                self._best[rows, length, start] = attention, self._pieces
            return [*found, Measured(f"{name}, element-wise compiled", compiled_timing, attention)]
        except torch.OutOfMemoryError as error:
            return [Measured(name, None, note=first_line(error))]

    def _compiled(self, build: Callable[[Pieces], Step]) -> Step | str:
        """Step of compiled pieces, or the reason why there is none; after one failure the compiler is not asked again."""
        if not self._compile_error and self._compile_seconds > COMPILE_SECONDS:
            self._compile_error = f"torch.compile had taken {self._compile_seconds:.0f} s"
        if self._compile_error:
            return self._compile_error
        begin = time.perf_counter()
        try:
            self._pieces = self._pieces or compiled_pieces()
            return build(self._pieces)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways, and the peer without it is measured already
            self._compile_error = f"torch.compile failed: {first_line(error)}"
            return self._compile_error
        finally:
            self._compile_seconds += time.perf_counter() - begin


def lacking_text(kv_bytes: int, adapter_bytes: int, free_bytes: int) -> str:
    """Reason why KV and adapters do not fit the free memory, empty if they do."""
    if kv_bytes + adapter_bytes <= free_bytes:
        return ""
    adapters = f" and adapters {adapter_bytes / 2**30:.1f} GiB" if adapter_bytes else ""
    return f"KV takes {kv_bytes / 2**30:.1f} GiB{adapters}; {max(free_bytes, 0) / 2**30:.1f} GiB are free"


def fastest(build: Callable[[str], Step]) -> str:
    """Name of the attention with which the step is fastest.

    Raises:
        RuntimeError: None works; the message has the error of each.
    """
    seconds: dict[str, float] = {}
    errors = []
    for attention in GPU_ATTENTION:
        try:
            seconds[attention] = best_of(build(attention).run, repeats=2)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # "No available kernel"
            errors.append(f"{attention}: {first_line(error)}")
    if not seconds:
        raise RuntimeError("; ".join(errors))
    return min(seconds, key=seconds.__getitem__)


def _backend(attention: str) -> SDPBackend:
    return getattr(SDPBackend, f"{attention.upper()}_ATTENTION")


def _pending(result: torch.Tensor) -> Pending:
    return Pending()


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
