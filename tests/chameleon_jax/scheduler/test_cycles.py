"""S-LoRA's loop: the content of a step, the start of a batch, and no request that has started is ever sent back."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.eviction import POLICIES
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import RequestState
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.scheduler.cycles import DECODES, PREFETCH_AT, PeakBatch
from chameleon_jax.systems import SYSTEMS
from tests.chameleon_jax.loop_traffic import PAGE_TOKENS, adapter, make_loop, make_request, run
from tests.properties import examples

CYCLES = [name for name, system in SYSTEMS.items() if system.cycles]
MOST_PROMPTS = 64
TRAFFIC = st.lists(
    st.tuples(
        st.integers(1, 45),  # prompt
        st.integers(1, 30),  # output
        st.integers(0, 3),  # adapter; 3: base
        st.integers(0, 12),  # steps before the next one
    ),
    min_size=1,
    max_size=25,
)


def record(loop: ServingLoop) -> list[tuple[StepPlan, int, bool]]:
    """Record each plan with the requests that ran before it, and whether it left prompts uncomputed."""
    plans: list[tuple[StepPlan, int, bool]] = []
    make_plan = loop.scheduler.plan

    def plan(now):
        running = len(loop.scheduler.running)
        made = make_plan(now)
        copied = dataclasses.replace(made, prefills=list(made.prefills), decodes=list(made.decodes))
        plans.append((copied, running, loop.scheduler._running.has_prompts))
        return made

    loop.scheduler.plan = plan  # type: ignore[method-assign]
    return plans


def serve(traffic, system: str, num_pages: int):
    loop, _, _ = make_loop(num_pages, 2, system=system, max_num_seqs=16, max_num_batched_tokens=MOST_PROMPTS)
    for i in range(3):
        loop.adapters.add(f"a{i}", adapter(f"a{i}", 1 + 2 * i))
    plans, requests = record(loop), []
    for number, (prompt, output, which, steps) in enumerate(traffic):
        requests.append(make_request(number, prompt, output, None if which == 3 else f"a{which}", ignore_eos=True))
        loop.submit(requests[-1])
        for _ in range(steps):
            loop.step()
    run(loop)
    return loop, plans, requests


@examples(60)
@given(traffic=TRAFFIC, num_pages=st.integers(30, 90), system=st.sampled_from(CYCLES))
def test_prompts_run_alone_and_ten_steps_decode_between_batches(traffic, num_pages, system):
    _, plans, _ = serve(traffic, system, num_pages)
    decodes, under_way = 0, False
    for plan, running, left in plans:
        assert not (plan.prefills and plan.decodes)
        if plan.prefills:
            assert under_way or decodes >= DECODES or not running
            decodes, under_way = 0, left  # the batch's other prompts follow at once
        else:
            assert not under_way or not plan.decodes
            decodes += bool(plan.decodes)


@examples(60)
@given(traffic=TRAFFIC, num_pages=st.integers(30, 90))
def test_what_starts_by_the_peak_is_never_sent_back(traffic, num_pages):
    loop, plans, requests = serve(traffic, "s-lora-published", num_pages)
    assert loop.scheduler.counters.memory_preemptions == 0
    assert all(request.state is RequestState.FINISHED for request in requests)
    starts = [request.metrics.first_scheduled_time for request in requests]
    assert starts == sorted(starts)
    for plan, _, _ in plans:
        assert sum(chunk.num_tokens for chunk in plan.prefills) <= MOST_PROMPTS


def test_a_batch_without_a_limit_computes_its_prompts_in_several_steps():
    for system, batches in (("s-lora-published", [2, 1]), ("chameleon-published", [3])):
        loop, _, _ = make_loop(200, system=system, max_num_batched_tokens=MOST_PROMPTS, max_num_seqs=8)
        plans = record(loop)
        for number in range(3):
            loop.submit(make_request(number, 30, 20, ignore_eos=True))
        run(loop)
        found, previous = [], 0
        for plan, _, _ in plans:
            starting = [chunk.request for chunk in plan.prefills if chunk.start == 0]
            if starting and previous:
                found[-1] += len(starting)
            elif starting:
                found.append(len(starting))
            previous = len(plan.prefills)
        assert found == batches


def test_adapters_of_the_head_are_loaded_twice_in_a_cycle():
    loop, _, _ = make_loop(200, 1, system="s-lora-published", max_num_seqs=8, max_num_batched_tokens=MOST_PROMPTS)
    for i in range(4):
        loop.adapters.add(f"a{i}", adapter(f"a{i}", 1))
    plans = record(loop)
    loop.submit(make_request(0, 4, 20, "a0", ignore_eos=True))
    loop.step()
    loop.submit(make_request(1, 40, 20, "a1", ignore_eos=True))
    loop.submit(make_request(2, 40, 20, "a2", ignore_eos=True))  # beyond a batch's prompts
    for _ in range(PREFETCH_AT[0] + 1):
        loop.step()
    decodes = [plan for plan, _, _ in plans if plan.decodes]
    assert [len(plan.loads) for plan in decodes[: PREFETCH_AT[0]]] == [0, 0, 0, 0, 1]
    assert loop.cache.entry("a1").tier.value in ("loading", "resident")
    assert loop.cache.entry("a2").tier.value == "host"
    run(loop)
    assert (loop.cache.counters.misses, loop.cache.counters.hits) == (1, 2)  # the last one's was loaded in the next cycle


@pytest.mark.parametrize(
    "requests,peak",
    [
        ([(10, 5)], 15),
        ([(10, 5), (4, 20)], 24),  # both grow by 5: 10 + 5 + 4 + 5; then the second alone to 24
        ([(10, 9), (4, 20)], 32),  # 10 + 9 + 4 + 9
        ([(1, 30), (1, 2), (1, 2)], 31),
        ([(8, 3), (8, 3), (8, 3)], 33),
    ],
)
def test_the_peak_is_where_a_request_ends(requests, peak):
    batch = make_batch(page_tokens=1)
    made = [make_request(i, known, left) for i, (known, left) in enumerate(requests)]
    assert batch.peak_pages(made) == peak
    assert batch.peak_pages(made[::-1]) == peak


@examples(100)
@given(requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_the_peak_bounds_the_pages_of_every_step(requests):
    made = [make_request(i, known, left) for i, (known, left) in enumerate(requests)]
    bound = make_batch(PAGE_TOKENS).peak_pages(made)
    most = 0
    for step in range(41):
        running = [(known, left) for known, left in requests if left >= step]
        most = max(most, sum(-(-(known + step) // PAGE_TOKENS) for known, left in running))
    assert most <= bound <= most + len(requests)


def test_the_peak_counts_each_adapter_and_each_pin_once():
    batch = make_batch(page_tokens=1)
    for name, pages in (("a", 3), ("b", 5), ("c", 7)):
        batch.cache.add(adapter(name, pages), 0.0)
    batch.cache.pin("b")
    batch.cache.pin("c")
    made = [make_request(0, 4, 6, "a"), make_request(1, 4, 6, "a"), make_request(2, 4, 6, "b")]
    assert batch.peak_pages(made) == 30 + 3 + 5 + 7


def make_batch(page_tokens: int) -> PeakBatch:
    cache = AdapterCache(PagePool(100), next(iter(POLICIES)), lambda content_hash: None)
    return PeakBatch(cache, 8, 64, lambda request: request.num_known, False, page_tokens=page_tokens)
