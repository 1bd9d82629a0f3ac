"""The serving loop under a virtual clock.

Scheduler, cache and pool are the ones that serve; the device is a cost model.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, TypeAlias

import numpy as np
import typer

from benchmarks.machine import describe, publish
from benchmarks.outcome import Outcome, Recorder
from benchmarks.simulator.cost_model import (
    LENGTH_FACTOR,
    PROFILES,
    S_LORA_BATCH_TOKENS,
    STEP_TOKENS,
    CostModel,
    Profile,
    stall_seconds,
)
from benchmarks.workload import (
    Duration,
    LengthFactor,
    Locality,
    NumAdapters,
    Rps,
    Seed,
    Shape,
    Trace,
    Workload,
    WorkloadSpec,
    generate,
)
from chameleon_jax.config import EngineConfig
from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.scheduler.length_predictor import ConfusionPredictor, LengthPredictor, OraclePredictor
from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes
from chameleon_jax.systems import System, get_system

TOKEN, STOP = 1, 2
SAMPLE_S = 1.0
"""Seconds between samples of memory."""
SYSTEMS = ("s-lora", "chameleon", "chameleon-plus")
Predictor: TypeAlias = Annotated[
    str, typer.Option(help="Predictor of output lengths: history, oracle or proxy-ACCURACY, with an accuracy of 0 to 1.")
]


class VirtualClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedExecutor:
    """Executor that takes as long as the cost model says, by moving the clock.

    The device runs one step after the other, the link one transfer after the other. Both run beside the host and each other.

    Args:
        last: Request id to the position of its last token.
        sizes: Content hash to bytes.
        copies: Copies of an adapter in a load.
        holds_loop: Whether the loop itself launches the copies, as S-LoRA's does; otherwise that time is the link's.
    """

    num_compiled = 0

    def __init__(
        self,
        cost: CostModel,
        clock: VirtualClock,
        last: dict[str, int],
        sizes: dict[str, int],
        copies: int,
        holds_loop: bool,
    ):
        self._cost = cost
        self._clock = clock
        self._last = last
        self._sizes = sizes
        self._copies = copies
        self._holds_loop = holds_loop
        self._device_free = 0.0
        self._link_free = 0.0
        self._loads: dict[str, float] = {}
        self.device_busy = self.link_busy = 0.0

    def dispatch(self, plan: StepPlan) -> tuple[float, list[SampledToken]]:
        self._clock.now += self._cost.profile.host
        seconds = self._cost.step(plan)
        self.device_busy += seconds
        self._device_free = max(self._clock.now, self._device_free) + seconds
        last = self._last
        sampling = [chunk.request for chunk in plan.prefills if chunk.samples] + plan.decodes
        tokens = [SampledToken(r, STOP if r.num_computed >= last[r.request_id] else TOKEN) for r in sampling]
        return self._device_free, tokens

    def draw(self, handle: object) -> None:
        pass

    def collect(self, handle: tuple[float, list[SampledToken]]) -> list[SampledToken]:
        end, tokens = handle
        self._clock.now = max(self._clock.now, end)
        return tokens

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        launches, transfers = self._cost.load(self._sizes[content_hash], self._copies)
        if self._holds_loop:
            self._clock.now += launches
            launches = 0.0
        seconds = launches + transfers
        self.link_busy += seconds
        self._link_free = max(self._clock.now, self._link_free) + seconds
        self._loads[content_hash] = self._link_free

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        if not self._loads:
            return []
        if wait:
            self._clock.now = max(self._clock.now, min(self._loads.values()))
        ended = [name for name, end in self._loads.items() if end <= self._clock.now]
        for name in ended:
            del self._loads[name]
        return [LoadResult(name) for name in ended]

    def cancel_load(self, content_hash: str) -> None:
        del self._loads[content_hash]  # transfers queued behind it keep their times

    def forget(self, content_hash: str) -> None:
        pass

    def reset(self) -> None:
        self._loads.clear()


@dataclasses.dataclass
class Result(Outcome):
    """Figures of a simulation, beside the figures that every run has.

    Attributes:
        wall_s: Seconds that the simulation took.
        device_busy: Seconds for which the device computed.
        link_busy: Seconds for which the link transferred.
    """

    arrival: np.ndarray
    input: np.ndarray
    rank: np.ndarray
    wall_s: float
    device_busy: float
    link_busy: float

    def ttft_percentile(self, q: float) -> float:
        return float(np.percentile(self.ttft, q))


def make_predictor(name: str, true: dict[str, int], factor: float, seed: int) -> LengthPredictor | None:
    """Make a predictor; None for `history`, which is the loop's own.

    The name is `history`, `oracle`, or the accuracy of a proxy classifier, as in `proxy-0.8`, whose classes scale with the
    workload's lengths. `true` has the output tokens by request id.
    """
    if name == "history":
        return None
    if name == "oracle":
        return OraclePredictor(lambda request: true[request.request_id])
    if name.startswith("proxy-"):
        cuts, typical = [141 * factor, 503 * factor], [70 * factor, 270 * factor, 640 * factor]
        return ConfusionPredictor(lambda request: true[request.request_id], float(name[6:]), cuts, typical, seed)
    raise ValueError(f"predictor is {name!r}; allowed: history, oracle, proxy-ACCURACY")


def batch_max_tokens(profile: Profile) -> int:
    """Most prompt tokens of a batch in S-LoRA's loop, as its code chooses: a sixth of the pool, 3,072 at least.

    Rounded down to a multiple of 32, as `EngineConfig.max_num_batched_tokens` is one.
    """
    return max(profile.num_pages * profile.layout.page_tokens // 6, S_LORA_BATCH_TOKENS) // 32 * 32


def step_tokens(system: str | System, tokens: int) -> int:
    """Largest number of prompt tokens in a step.

    Systems that bound stalls bound their steps by time; four times as many tokens let the time be the bound.
    """
    return tokens * (4 if get_system(system).bound_stalls else 1)


def simulate(
    workload: Workload,
    profile: Profile,
    system: str | System,
    *,
    predictor: str = "proxy-0.8",
    length_factor: float = LENGTH_FACTOR,
    seed: int = 0,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int | None = None,
    ttft_slo: float = 5.0,
    tbt_slo: float | None = None,
    cost_model: Callable[[Profile, dict[str, int]], CostModel] = CostModel,
    shapes: StepShapes = ANY_SIZE,
) -> Result:
    """Serve a workload to its end.

    Args:
        workload: The requests.
        profile: Model and device.
        system: Name of a system, or the system.
        predictor: Name of a predictor of output lengths (see `make_predictor`).
        length_factor: Factor of Azure's lengths, for the predictor's guesses.
        seed: Seed of the predictor's errors.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Prompt tokens of a step, before `step_tokens`. None is STEP_TOKENS, and `batch_max_tokens` for
            S-LoRA's loop.
        ttft_slo: Target for the time to first token, seconds.
        tbt_slo: Target for the time between tokens, seconds. None takes `cost_model.stall_seconds` of the profile: the 99th
            percentile that systems without a bound have.
        cost_model: Makes a cost model of a profile and of the ranks of adapters by name.
        shapes: Sizes of the steps for which the device has programs.
    """
    begin = time.perf_counter()
    adapters = [f"adapter-{i}" for i in range(len(workload.ranks))]
    ranks = dict(zip(adapters, workload.ranks.tolist()))
    cost, clock = cost_model(profile, ranks), VirtualClock()
    longest = int(workload.output_tokens.max())
    true = {f"r{i}": n for i, n in enumerate(workload.output_tokens.tolist())}
    last = {f"r{i}": int(p + n - 1) for i, (p, n) in enumerate(zip(workload.input_tokens, workload.output_tokens))}
    infos = {}
    for name, rank in ranks.items():
        pages = profile.adapter_pages(rank)
        infos[name] = AdapterInfo(name, rank, pages, pages * profile.page_bytes)
    sizes = {name: info.num_bytes for name, info in infos.items()}
    system = get_system(system)
    if max_num_batched_tokens is None:
        max_num_batched_tokens = batch_max_tokens(profile) if system.cycles else STEP_TOKENS
    executor = SimulatedExecutor(cost, clock, last, sizes, system.transfers_per_load, system.cycles)
    config = EngineConfig(
        system=system,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens(system, max_num_batched_tokens),
        ttft_slo=ttft_slo,
        tbt_slo=stall_seconds(profile) if tbt_slo is None else tbt_slo,
        predicted_output_len=max(1, round(211 * length_factor)),
    )
    loop = ServingLoop(
        config,
        executor,
        profile.num_pages,
        page_tokens=profile.layout.page_tokens,
        max_model_len=1 << 20,
        shapes=shapes,
        clock=clock,
        predictor=make_predictor(predictor, true, length_factor, seed),
    )
    for name, info in infos.items():
        loop.adapters.add(name, info)
    limit = SamplingParams(temperature=0, max_tokens=longest)
    stop = frozenset([STOP])
    pending = deque(
        # S-LoRA's own benchmark asks for the true length, which makes the worst case that it reserves for exact
        Request(
            f"r{i}",
            range(n),
            SamplingParams(temperature=0, max_tokens=out) if system.reserve != "predicted" else limit,
            arrival,
            0,
            stop,
            adapters[a],
        )
        for i, (arrival, n, out, a) in enumerate(
            zip(
                workload.arrival_s.tolist(),
                workload.input_tokens.tolist(),
                workload.output_tokens.tolist(),
                workload.adapter.tolist(),
            )
        )
    )
    requests = list(pending)
    recorder = Recorder(loop, SAMPLE_S)
    while pending or loop.has_unfinished:
        while pending and pending[0].arrival_time <= clock.now:
            loop.submit(pending.popleft())
        if not loop.has_unfinished:
            clock.now = pending[0].arrival_time
            continue
        recorder.stepped(loop.step(), clock.now)
        recorder.sample(clock.now)
    return Result(
        **recorder.measured(requests, workload, clock.now),
        arrival=workload.arrival_s,
        input=workload.input_tokens,
        rank=workload.ranks[workload.adapter],
        wall_s=time.perf_counter() - begin,
        device_busy=executor.device_busy,
        link_busy=executor.link_busy,
    )


def _overridden(system: str, settings: list[str]) -> System:
    """Named system with fields set as `field=value`; a value that is JSON is read as JSON."""
    known = {field.name for field in dataclasses.fields(System)}
    changes = {}
    for setting in settings:
        field, separator, value = setting.partition("=")
        if not separator or field not in known:
            raise typer.BadParameter(f"--set is {setting!r}; allowed: FIELD=VALUE, FIELD one of {', '.join(sorted(known))}")
        try:
            changes[field] = json.loads(value)
        except json.JSONDecodeError:
            changes[field] = value
    return dataclasses.replace(get_system(system), **changes)


def main(
    system: Annotated[
        list[str] | None, typer.Option(help=f"System to simulate; repeat for several (default: {', '.join(SYSTEMS)}).")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Policy to change in every system, as FIELD=VALUE; repeat for several (default: none)."),
    ] = None,
    profile: Annotated[str, typer.Option(help=f"Simulated device and model: {', '.join(PROFILES)}.")] = "a40-llama-7b",
    rps: Rps = 9.0,
    duration_s: Duration = 600.0,
    seed: Seed = 0,
    predictor: Predictor = "proxy-0.8",
    length_factor: LengthFactor = LENGTH_FACTOR,
    num_adapters: NumAdapters = 100,
    locality: Locality = 0.0,
    shape: Shape = "flat",
    trace: Trace = None,
) -> None:
    """Serve one workload on simulated hardware with several systems in turn.

    Example: python -m benchmarks simulate --system chameleon --profile a40-llama-7b --rps 9
    """
    if profile not in PROFILES:
        raise typer.BadParameter(f"--profile is {profile!r}; allowed: {', '.join(PROFILES)}")
    spec = WorkloadSpec(
        rps, duration_s, seed, length_factor, num_adapters=num_adapters, locality=locality, shape=shape, trace=trace
    )
    workload, rows = generate(spec), []
    for name in system or SYSTEMS:
        chosen = _overridden(name, change or [])
        result = simulate(workload, PROFILES[profile], chosen, predictor=predictor, length_factor=length_factor, seed=seed)
        rows.append(
            {
                "system": name,
                "TTFT p50 s": round(result.ttft_percentile(50), 3),
                "TTFT p99 s": round(result.ttft_percentile(99), 3),
                "TBT p99 s": round(float(np.percentile(result.tbt, 99)), 3),
                "hit rate": round(result.hit_rate, 3),
                "GB loaded": round(result.bytes_loaded / 1e9, 1),
                "preemptions": result.preemptions,
                "wall s": round(result.wall_s, 2),
                "tokens simulated a second": round((len(result.tbt) + len(result.ttft)) / result.wall_s),
            }
        )
    publish(describe() | {"simulated": profile, "requests": len(workload), "table": rows}, None)
