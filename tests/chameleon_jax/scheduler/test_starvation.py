"""Waiting and quotas through the serving loop, in virtual time: a second a step, random and hostile arrivals.

The starvation bound in the docstring of `multilevel` is held to as tightly as its proof allows: of the older requests only
those that wait at arrival count among the n, and L follows from the requests' lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.config import EngineConfig
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.request import Request, RequestState
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import level_planner, single_queue
from chameleon_jax.scheduler.level import Level
from chameleon_jax.scheduler.multilevel import HEAD_TIMEOUT_S, SQUASH_SHARE, MultiLevelQueue
from chameleon_jax.scheduler.request_queue import MAX_PASSES
from chameleon_jax.systems import SYSTEMS, System
from tests.chameleon_jax.fake_executor import FakeExecutor
from tests.properties import examples

PAGE_TOKENS = 4
START = 100.0
"""Seconds of the clock at the start."""
MULTILEVEL = [name for name, system in SYSTEMS.items() if system.order == "multilevel"]


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request that arrives `gap` seconds after the one before it."""

    gap: float
    prompt: int
    output: int
    adapter: str | None = None
    priority: int = 0


SMALL, LARGE = Arrival(0.0, 3, 3), Arrival(0.0, 30, 20)
KINDS = [SMALL, Arrival(0.0, 3, 4, "a"), Arrival(0.0, 10, 8, "b"), LARGE, Arrival(0.0, 30, 20, "c"), Arrival(0.0, 4, 20)]
ADAPTERS = {"a": 1, "b": 4, "c": 10}


def after(gap: float, kind: Arrival) -> Arrival:
    return dataclasses.replace(kind, gap=gap)


@pytest.fixture(scope="module", autouse=True)
def levels_form_early() -> Iterator[None]:
    with mock.patch.object(level_planner, "FIRST_REFRESH", 10):
        yield


class Zeros(FakeExecutor):
    """Executor whose every token is 0. The content of pages is tested in `tests/chameleon_jax/test_loop.py`."""

    def _sample(self, request, length: int) -> int:
        return self.slots.setdefault(request.slot, 0)


class Simulation:
    """A loop whose every step takes a second.

    Attributes:
        ahead: for each request, the older ones that waited when it arrived, and those preempted while it waited.
        most_levels: for each request, the most levels while it waited.
        steps: for each step, the requests that waited before it, and those of them that it started.
    """

    def __init__(self, system: str | System, num_pages: int, slots: int = 8, step_tokens: int = 512):
        self.now = START
        config = EngineConfig(
            system=system,
            max_num_seqs=slots,
            max_num_batched_tokens=step_tokens,
            predicted_output_len=6,
            page_tokens=PAGE_TOKENS,
        )
        executor = Zeros(PAGE_TOKENS, load_polls=0)
        self.loop = ServingLoop(config, executor, num_pages, page_tokens=PAGE_TOKENS, max_model_len=80, clock=lambda: self.now)
        for name, pages in ADAPTERS.items():
            self.loop.adapters.add(name, AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages))
        self.requests: list[Request] = []
        self.ahead: list[int] = []
        self.most_levels: list[int] = []
        self.steps: list[tuple[list[Request], list[Request]]] = []
        self._unstarted: list[int] = []
        self._submitted: list[int] = []  # since the last step
        self._levels = 1

    @property
    def levels(self) -> list[Level]:
        return self.loop.scheduler.policy.levels  # type: ignore[attr-defined]

    def submit(self, kind: Arrival) -> Request:
        tokens = [len(self.requests) % 50] * kind.prompt
        made = Request(
            f"r{len(self.requests)}", tokens, SamplingParams(max_tokens=kind.output), self.now, seed=0, adapter=kind.adapter
        )
        made.priority = kind.priority
        self.ahead.append(self.loop.scheduler.num_waiting)
        self.loop.submit(made)
        self.requests.append(made)
        self.most_levels.append(1)
        self._unstarted.append(len(self.requests) - 1)
        self._submitted.append(len(self.requests) - 1)
        return made

    def step(self) -> None:
        self._unstarted = [i for i in self._unstarted if self.requests[i].metrics.first_scheduled_time is None]
        preemptions = {r.order: r.metrics.num_preemptions for r in self.loop.scheduler.running}
        waiting = [r for r in self.loop.unfinished if r.state is RequestState.WAITING]
        self.loop.step()
        self.steps.append((waiting, [r for r in waiting if r.state is RequestState.RUNNING]))
        preempted = [order for order, n in preemptions.items() if self.requests[order - 1].metrics.num_preemptions > n]
        count = len(getattr(self.loop.scheduler.policy, "levels", "1"))
        if preempted:
            for i in self._unstarted:
                self.ahead[i] += sum(order < self.requests[i].order for order in preempted)
        for i in self._unstarted if count > self._levels else self._submitted:
            self.most_levels[i] = max(self.most_levels[i], count)
        self._levels, self._submitted = count, []
        self.now += 1

    def run(self, arrivals: list[Arrival] | None = None, limit: int = 20_000) -> Simulation:
        due, left = self.now, list(arrivals or ())[::-1]
        for _ in range(limit):
            while left and due + left[-1].gap <= self.now:
                due += left[-1].gap
                self.submit(left.pop())
            if not left and not self.loop.has_unfinished:
                return self
            self.step()
        raise AssertionError("the loop does not end")

    def warm(self) -> Simulation:
        """Run small and large requests, so that levels form."""
        self.run([after(1.0, LARGE if i % 3 == 0 else SMALL) for i in range(12)])
        assert len(self.levels) > 1
        return self

    def longest_run(self) -> float:
        """L: a step for every prompt where they do not fit one together, and one for every output token."""
        longest = max(r.max_total_tokens for r in self.requests)
        slots, step_tokens = self.loop.config.max_num_seqs, self.loop.config.max_num_batched_tokens
        assert longest <= step_tokens
        prefill = 1 if slots * longest <= step_tokens else slots
        return prefill + max(r.params.max_tokens for r in self.requests)


def waited(request: Request) -> float:
    assert request.metrics.first_scheduled_time is not None
    return request.metrics.first_scheduled_time - request.arrival_time


def test_small_requests_do_not_wait_behind_large_ones():
    waits = {}
    for system in ("chameleon", "chameleon-no-sched"):
        simulation = Simulation(system, 60)
        simulation.run([after(1.0, LARGE if i % 3 == 0 else SMALL) for i in range(12)])
        for _ in range(20):
            simulation.submit(LARGE)
        small = simulation.submit(SMALL)
        simulation.run()
        waits[system] = waited(small)
    assert waits["chameleon"] <= 1 < 20 < waits["chameleon-no-sched"]


@pytest.mark.parametrize("slots", [2, 8])
def test_large_requests_are_not_starved_by_a_stream_of_small_ones(slots):
    """More small requests arrive than can run, and they find room where the large one does not."""
    simulation = Simulation("chameleon", 40, slots).warm()
    for _ in range(2 * slots):
        simulation.submit(SMALL)
    simulation.step()
    large = simulation.submit(Arrival(0.0, 30, 20, "c"))
    for _ in range(200):
        for _ in range(slots):
            simulation.submit(SMALL)
        simulation.step()
    assert len(simulation.levels) > 1
    assert waited(large) <= 2 * HEAD_TIMEOUT_S + 20


PHASES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 2.0, 3.0]),  # seconds between two
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=6,
)


def arrivals_of(phases) -> list[Arrival]:
    """Arrivals in which the prompts of one kind differ by a few tokens."""
    kinds = [(kinds[i % len(kinds)], gap) for kinds, gap, count in phases for i in range(count)]
    return [dataclasses.replace(kind, gap=gap, prompt=kind.prompt + i % 4) for i, (kind, gap) in enumerate(kinds)]


@examples(15)
@given(phases=PHASES, num_pages=st.integers(27, 80), system=st.sampled_from(MULTILEVEL))
def test_quotas_are_whole_again_when_everything_has_ended(phases, num_pages, system):
    simulation = Simulation(system, num_pages)
    with mock.patch.object(level_planner, "REFRESH_S", 30.0):
        for number, arrival in enumerate(arrivals_of(phases)):
            simulation.submit(arrival)
            if number % 7 == 6:
                simulation.loop.abort(simulation.requests[number // 2].request_id)
            if arrival.gap >= 1:
                simulation.step()
        simulation.run()
    policy = simulation.loop.scheduler.policy
    assert isinstance(policy, MultiLevelQueue)
    assert not any(level.waiting for level in policy.levels) and all(level.remaining == level.quota for level in policy.levels)
    assert all(r.state is RequestState.FINISHED for r in simulation.requests)
    assert simulation.loop.scheduler.counters.bypass_squashes <= SQUASH_SHARE * len(simulation.requests) + 1
    assert simulation.loop.counters.finished == len(simulation.requests)


STREAMS = st.builds(
    lambda stream, victim, first, gap, count: [([stream], 0.0, first), ([victim], 1.0, 1), ([stream], gap, count)],
    st.sampled_from([SMALL, SMALL, *KINDS]),
    st.sampled_from([*KINDS, LARGE, KINDS[4]]),
    st.integers(1, 16),
    st.sampled_from([0.125, 0.25, 0.5]),
    st.integers(150, 350),
)
"""One request arrives when others have taken all memory, and more of the others than can run follow."""


@examples(15)
@given(
    phases=st.one_of(PHASES, STREAMS, STREAMS),
    num_pages=st.one_of(st.integers(27, 34), st.integers(27, 80)),
    slots=st.sampled_from([2, 3, 8]),
    step_tokens=st.sampled_from([64, 512]),
    system=st.sampled_from(MULTILEVEL),
)
def test_no_request_waits_longer_than_the_starvation_bound(phases, num_pages, slots, step_tokens, system):
    simulation = Simulation(system, num_pages, slots, step_tokens).run([after(1.0, KINDS[i % 6]) for i in range(12)])
    simulation.run(arrivals_of(phases))
    longest = simulation.longest_run()
    for request, ahead, count in zip(simulation.requests, simulation.ahead, simulation.most_levels):
        bound = (ahead + 1) * ((count + 1) * longest + HEAD_TIMEOUT_S)
        assert waited(request) <= bound, f"{request.request_id}: {ahead} ahead, {count} levels, L = {longest}"


@examples(15)
@given(phases=PHASES, num_pages=st.integers(27, 80), slots=st.sampled_from([2, 8]))
def test_a_head_start_is_never_larger_than_its_bound(phases, num_pages, slots):
    """Without adapters, a request that arrives later than the largest head start also starts later."""
    assert SYSTEMS["chameleon-plus"].order == "boost"
    simulation = Simulation("chameleon-plus", num_pages, slots)
    simulation.run([dataclasses.replace(arrival, adapter=None) for arrival in arrivals_of(phases)])
    most = single_queue.MAX_BOOST * simulation.loop.config.ttft_slo
    for number, request in enumerate(simulation.requests):
        started = request.metrics.first_scheduled_time
        for later in simulation.requests[number + 1 :]:
            if later.arrival_time > request.arrival_time + most:
                assert later.metrics.first_scheduled_time >= started


def with_classes(arrivals: list[Arrival], priorities: list[int], **changes) -> list[Arrival]:
    """Give arrivals the priorities in turn."""
    return [dataclasses.replace(a, priority=priorities[i % len(priorities)], **changes) for i, a in enumerate(arrivals)]


PRIORITIES = st.lists(st.sampled_from([-1, 0, 0, 5]), min_size=1, max_size=7)
SINGLE = ["fifo", "sjf", "chameleon-plus"]


@examples(15)
@given(
    phases=PHASES, num_pages=st.integers(27, 80), system=st.sampled_from([*SINGLE, "chameleon"]), priority=st.integers(-5, 5)
)
def test_one_class_of_any_priority_starts_as_without_priorities(phases, num_pages, system, priority):
    starts = []
    for only in (0, priority):
        simulation = Simulation(system, num_pages).run(with_classes(arrivals_of(phases), [only]))
        starts.append([(r.metrics.first_scheduled_time, r.metrics.num_preemptions) for r in simulation.requests])
    assert starts[0] == starts[1]


@examples(15)
@given(
    phases=PHASES,
    priorities=PRIORITIES,
    num_pages=st.integers(27, 80),
    slots=st.sampled_from([2, 8]),
    system=st.sampled_from(SINGLE),
)
def test_one_start_in_ten_at_most_passes_a_higher_class(phases, priorities, num_pages, slots, system):
    """Where nothing is preempted and no adapter loads."""
    chosen = dataclasses.replace(SYSTEMS[system], reserve="max_tokens")
    simulation = Simulation(chosen, num_pages, slots).run(with_classes(arrivals_of(phases), priorities, adapter=None))
    num_starts = num_passes = 0
    for waiting, started in simulation.steps:
        left = [r.priority for r in waiting if r not in started]
        num_starts += len(started)
        num_passes += sum(r.priority > min(left, default=r.priority) for r in started)
        assert num_passes <= num_starts / (MAX_PASSES + 1)
    assert num_starts == len(simulation.requests)


@examples(15)
@given(phases=PHASES, priorities=PRIORITIES, num_pages=st.integers(27, 80), slots=st.sampled_from([2, 8]))
def test_first_come_first_served_holds_in_a_class_and_ten_times_over_between_classes(phases, priorities, num_pages, slots):
    chosen = dataclasses.replace(SYSTEMS["fifo"], reserve="max_tokens")
    simulation = Simulation(chosen, num_pages, slots).run(with_classes(arrivals_of(phases), priorities, adapter=None))
    passed = dict.fromkeys((r.request_id for r in simulation.requests), 0)
    for waiting, starts in simulation.steps:
        for request in set(waiting) - set(starts) if starts else ():
            passed[request.request_id] += len(starts)
    latest: dict[int, float] = {}
    for request, ahead in zip(simulation.requests, simulation.ahead):
        started = request.metrics.first_scheduled_time
        assert started is not None and latest.get(request.priority, 0.0) <= started
        latest[request.priority] = started
        assert passed[request.request_id] < (MAX_PASSES + 1) * (ahead + 1)


@examples(15)
@given(
    phases=st.one_of(PHASES, STREAMS),
    priorities=PRIORITIES,
    num_pages=st.integers(27, 80),
    slots=st.sampled_from([2, 3, 8]),
    system=st.sampled_from(MULTILEVEL),
)
def test_the_starvation_bound_with_classes(phases, priorities, num_pages, slots, system):
    simulation = Simulation(system, num_pages, slots).run([after(1.0, KINDS[i % 6]) for i in range(12)])
    simulation.run(with_classes(arrivals_of(phases), priorities))
    longest = simulation.longest_run()
    for request, ahead, count in zip(simulation.requests, simulation.ahead, simulation.most_levels):
        bound = (MAX_PASSES + 1) * (ahead + 1) * ((count + 1) * longest + HEAD_TIMEOUT_S)
        assert waited(request) <= bound, f"{request.request_id}: {ahead} ahead, {count} levels, L = {longest}"
    assert all(r.state is RequestState.FINISHED for r in simulation.requests)


@pytest.mark.parametrize("system", ["fifo", "chameleon", "chameleon-plus"])
def test_a_low_class_starts_and_ends_under_a_stream_of_a_high_class_that_fills_memory(monkeypatch, system):
    """A request arrives every second, more than can run, and outgrows its prediction, so that others are preempted."""
    monkeypatch.setattr(level_planner, "FIRST_REFRESH", 10_000)
    simulation = Simulation(system, 30, slots=8)
    stream = Arrival(0.0, 4, 20, priority=-1)
    for _ in range(8):
        simulation.submit(stream)
    low = simulation.submit(dataclasses.replace(stream, priority=1))
    while low.state is not RequestState.FINISHED:
        simulation.submit(stream)
        simulation.step()
        assert simulation.now < START + 1000
    passed = sum(len(started) for waiting, started in simulation.steps if low in waiting and low not in started)
    assert simulation.loop.scheduler.counters.memory_preemptions > 0 and passed > MAX_PASSES
