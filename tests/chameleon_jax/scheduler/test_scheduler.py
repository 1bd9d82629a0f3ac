"""Counters and queue sizes of a scheduler whose steps run at once."""

from __future__ import annotations

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import Scheduler, StepPlan
from chameleon_jax.scheduler.length_predictor import HistoryPredictor
from chameleon_jax.scheduler.stats import QueueStats, SchedulerCounters
from chameleon_jax.scheduler.step_budget import GUESSED_TOKEN_S
from chameleon_jax.scheduler.step_shapes import ANY_SIZE


class LatePredictor(HistoryPredictor):
    """Predictor with updates set by the test."""

    def __init__(self) -> None:
        super().__init__(prior=10)
        self.later: list[tuple[Request, int]] = []

    def updates(self) -> list[tuple[Request, int]]:
        later, self.later = self.later, []
        return later


def make_scheduler(system: str, num_pages: int = 40, max_num_seqs: int = 1, **adapters: int) -> tuple[Scheduler, LatePredictor]:
    pool, predictor = PagePool(num_pages), LatePredictor()
    cache = AdapterCache(pool)
    for name, pages in adapters.items():
        cache.add(AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages), 0.0)
    config = EngineConfig(system=system, max_num_seqs=max_num_seqs)
    return Scheduler(config, 4, cache, predictor, ANY_SIZE), predictor


def add(
    scheduler: Scheduler, number: int, adapter: str | None = None, prompt: int = 4, output: int = 40, priority: int = 0
) -> Request:
    made = Request(f"r{number}", [1] * prompt, SamplingParams(max_tokens=output), 0.0, seed=0, adapter=adapter, order=number)
    made.priority = priority
    scheduler.add(made, 0.0)
    return made


def run(scheduler: Scheduler, steps: int = 1) -> StepPlan:
    for _ in range(steps):
        plan = scheduler.plan(0.0)
        for request in [chunk.request for chunk in plan.prefills if chunk.samples] + plan.decodes:
            request.num_in_flight -= 1
            request.output_token_ids.append(0)
    return plan


def test_a_later_prediction_moves_a_waiting_request_and_is_counted():
    scheduler, predictor = make_scheduler("sjf")
    first, second, third = (add(scheduler, number) for number in range(3))
    run(scheduler)
    assert scheduler.running == [first] and scheduler.policy.upcoming(9) == [second, third]
    predictor.later = [(first, 1), (third, 5)]  # the first one runs already
    run(scheduler)
    assert scheduler.policy.upcoming(9) == [third, second]
    assert (first.predicted_output_len, third.predicted_output_len) == (10, 5)
    assert scheduler.counters == SchedulerCounters(length_updates=1)


def test_a_preemption_for_memory_is_counted_and_the_request_waits_again():
    scheduler, _ = make_scheduler("fifo", num_pages=12, max_num_seqs=2)
    old, young = add(scheduler, 0), add(scheduler, 1)
    run(scheduler, 30)
    assert scheduler.running == [old] and young.metrics.num_preemptions == 1
    assert scheduler.counters == SchedulerCounters(memory_preemptions=1) and scheduler.counters.preemptions == 1


def test_the_youngest_of_the_lowest_class_is_preempted_first_and_joins_the_class_that_takes_its_pages():
    scheduler, _ = make_scheduler("fifo", num_pages=16, max_num_seqs=3)
    low, younger, high = (add(scheduler, number, priority=priority) for number, priority in enumerate((5, 5, 0)))
    run(scheduler)
    assert scheduler.running == [low, younger, high]
    preempted: list[Request] = []
    while len(preempted) < 2:
        run(scheduler)
        preempted += [r for r in (low, younger, high) if r.metrics.num_preemptions and r not in preempted]
    assert preempted == [younger, low] and scheduler.running == [high]
    assert (low.priority, younger.priority, high.priority) == (0, 5, 0)
    late = add(scheduler, 3, priority=0)
    assert scheduler.policy.upcoming(9) == [low, late, younger]


def test_loads_ahead_of_a_turn_and_those_given_up_are_counted():
    scheduler, _ = make_scheduler("chameleon", a=2, b=2)
    add(scheduler, 0)
    waiting = [add(scheduler, number, adapter) for number, adapter in enumerate("ab", start=1)]
    assert [name for name, _ in run(scheduler).loads] == ["a", "b"]
    scheduler.finish(waiting[1], 0.0)
    assert run(scheduler).cancels == ["b"]
    assert scheduler.counters == SchedulerCounters(prefetches=2, cancelled_loads=1)


def test_steps_take_more_of_prompts_the_longer_one_that_waits_or_runs_is_not_computed():
    scheduler, _ = make_scheduler("chameleon-plus", num_pages=400, max_num_seqs=2)
    assert scheduler._budget.patience == EngineConfig.ttft_slo / 2
    add(scheduler, 0)
    run(scheduler)
    waits: list[float] = []
    scheduler._budget.bound_prefills = lambda plan, waited: waits.append(waited) or 40 * GUESSED_TOKEN_S
    late = add(scheduler, 1, prompt=100)
    for now in (1.0, 2.0, 3.0, 4.0):  # in the queue, then 40, 80 and 100 of its tokens are computed
        scheduler.plan(now)
    assert waits == [1.0, 2.0, 3.0, 0.0] and late.num_computed == 101


def test_a_single_queue_has_no_quota_and_the_paper_s_queues_have_the_pool():
    for system, queues in (("fifo", (QueueStats("0", 2),)), ("chameleon", (QueueStats("0", 2, 39, 35),))):
        scheduler, _ = make_scheduler(system)
        for number in range(3):
            add(scheduler, number)
        run(scheduler)
        assert scheduler.policy.queues() == queues
