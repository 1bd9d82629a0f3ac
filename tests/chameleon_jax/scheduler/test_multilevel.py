"""The paper's queues by hand, without a scheduler around them."""

from __future__ import annotations

import pytest

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request, RequestState
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import level_planner, multilevel
from chameleon_jax.scheduler.admission import AdmissionBatch
from chameleon_jax.scheduler.level import Level
from chameleon_jax.scheduler.level_planner import LevelPlanner
from chameleon_jax.scheduler.multilevel import HEAD_TIMEOUT_S, MultiLevelQueue
from chameleon_jax.scheduler.request_queue import MAX_PASSES
from chameleon_jax.scheduler.request_size import PageNeeds
from chameleon_jax.scheduler.stats import QueueStats, SchedulerCounters

START = 100.0
"""Seconds of the clock at the start."""


def request(
    number: int, pages: int, size: float = 0.0, adapter: str | None = None, tokens: int = 10, priority: int = 0
) -> Request:
    """Request that starts with so many KV pages: its prompt has as many tokens."""
    made = Request(f"r{number}", [1] * pages, SamplingParams(max_tokens=100), START, seed=0, adapter=adapter, order=number)
    made.size, made.predicted_output_len, made.priority = size, tokens, priority
    return made


class PromptPages(PageNeeds):
    """A page for every prompt token and none for the output."""

    def kv(self, request: Request) -> int:
        return len(request.prompt_token_ids)


class Order:
    """A `MultiLevelQueue` over a pool, driven as the scheduler drives it."""

    def __init__(self, total: int = 1000, quotas: tuple[int, ...] = (), bounds: tuple[float, ...] = (), **adapters: int):
        self.cache = AdapterCache(PagePool(total + 1))
        for name, pages in adapters.items():
            self.cache.add(AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages), START)
        self.counters = SchedulerCounters()
        needs, planner = PromptPages(self.cache, page_tokens=1), LevelPlanner(total, 5.0, self.counters)
        self.queue = MultiLevelQueue(needs, planner)
        if quotas:
            self.queue.bounds, self.queue.levels = list(bounds), [Level(quota) for quota in quotas]
        self.running: list[Request] = []

    def admit(self, now: float = START, slots: int = 100) -> list[int]:
        batch = AdmissionBatch(self.cache, slots, 1e9, lambda r: r.num_known, overlap_loads=False)
        self.queue.admit(batch, self.running, now)
        assert self.cache.reserve(batch.pages, now, keep=batch.keep)
        for adapter in batch.loads:
            self.cache.begin_load(adapter)
            self.cache.finish_load(adapter)
        for started in batch.starts:
            if started.adapter is not None:
                self.cache.acquire(started.adapter, now)
            started.pages = self.cache.pool.extend_kv(started.request_id, len(started.prompt_token_ids))
            started.state = RequestState.RUNNING
            self.running.append(started)
        return [started.order for started in batch.starts]

    def wait(self, *requests: Request) -> None:
        for each in requests:
            self.queue.add(each, START)

    def end(self, request: Request) -> None:
        self.running.remove(request)
        request.state = RequestState.FINISHED
        self.cache.pool.free_kv(request.request_id)
        if request.adapter is not None:
            self.cache.release(request.adapter, START)
        self.queue.release(request, START)

    def remaining(self) -> list[int]:
        return [level.remaining for level in self.queue.levels]


def test_every_level_starts_on_its_own_quota_small_ones_first():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(request(1, 15, 0.9), request(2, 15, 0.9), request(3, 4, 0.1), request(4, 4, 0.5), request(5, 4, 0.2))
    assert order.admit() == [3, 4, 1]
    assert [r.queue for r in order.running] == [0, 0, 1]
    assert order.remaining() == [2, 5] and len(order.queue.upcoming(9)) == 2
    assert order.admit() == []


def test_lent_quota_is_taken_from_the_donor_and_comes_back():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(request(1, 15, 0.9), request(2, 8, 0.9))
    assert order.admit() == [1, 2]
    assert order.remaining() == [2, 5]  # the second one runs on the small ones' quota
    order.wait(request(3, 6, 0.1))
    assert order.admit() == []  # 2 of its own, and 5 of the other level's
    order.end(order.running[1])
    assert order.remaining() == [10, 5]
    assert order.admit() == [3]
    order.end(order.running[0])
    order.end(order.running[0])
    assert order.remaining() == [10, 20]


def test_a_loan_may_come_from_several_levels_but_from_none_with_waiting_requests():
    order = Order(quotas=(10, 10, 10), bounds=(0.3, 0.6))
    order.wait(request(1, 10, 0.9), request(2, 15, 0.9))
    assert order.admit() == [1, 2]
    assert order.remaining() == [0, 5, 0]
    order = Order(quotas=(10, 10, 10), bounds=(0.3, 0.6))
    order.wait(request(1, 6, 0.1), request(2, 6, 0.1), request(3, 10, 0.9), request(4, 11, 0.9))
    assert order.admit() == [1, 3, 2]  # 4 and 10 are left of the first two levels; the first one's head takes from the second
    assert order.remaining() == [4, 4, 0]
    order.wait(request(5, 5, 0.1))
    assert order.admit() == [] and order.remaining() == [4, 4, 0]


def test_an_overdrawn_quota_lessens_no_loan():
    order = Order(quotas=(10, 10, 10), bounds=(0.3, 0.6))
    order.wait(request(1, 20, 0.1), request(2, 10, 0.9), request(3, 5, 0.9))
    assert order.admit() == [1, 2, 3] and order.remaining() == [-10, 5, 0]


@pytest.mark.parametrize(("num_waiting", "starts"), [(2, [9]), (3, [])])
@pytest.mark.parametrize("lent", [False, True])
def test_few_requests_that_wait_are_overtaken(monkeypatch, num_waiting, starts, lent):
    monkeypatch.setattr(multilevel, "MAX_OVERTAKEN", 2)
    order = Order(quotas=(10, 10), bounds=(0.5,))
    if lent:
        order.wait(request(0, 10, 0.9))
        assert order.admit() == [0]
    waiting = [request(number, 1, 0.9) for number in range(1, num_waiting + 1)]
    for each in waiting:
        each.num_in_flight = 1
    order.wait(*waiting, request(9, 1, 0.9))
    assert order.admit() == starts


def test_a_request_larger_than_its_quota_starts_when_nothing_is_charged_to_its_level():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(request(1, 5, 0.1), request(2, 40, 0.1))
    assert order.admit() == [1]
    order.end(order.running[0])
    assert order.admit() == [2] and order.remaining() == [-30, 20]
    order.end(order.running[0])
    assert order.remaining() == [10, 20]


def test_no_request_starts_before_a_head_that_has_waited_for_memory():
    order = Order(total=20, quotas=(20, 20), bounds=(0.5,))
    order.wait(request(1, 12, 0.1))
    assert order.admit() == [1]
    order.wait(request(2, 15, 0.9))
    assert order.admit(START) == []
    order.wait(request(3, 4, 0.1))
    assert order.admit(START + HEAD_TIMEOUT_S - 0.1) == [3]
    order.wait(request(4, 1, 0.1))
    assert order.admit(START + HEAD_TIMEOUT_S) == []
    order.end(order.running[0])
    assert order.admit(START + HEAD_TIMEOUT_S + 1) == [2, 4]


def test_no_request_starts_before_a_head_that_has_waited_for_a_slot():
    order = Order(quotas=(20, 20), bounds=(0.5,))
    order.wait(request(1, 1, 0.1), request(2, 1, 0.9), request(3, 1, 0.1))
    assert order.admit(START, slots=1) == [1]
    assert order.admit(START + HEAD_TIMEOUT_S / 2, slots=1) == [3]
    order.wait(request(4, 1, 0.1))
    assert order.admit(START + HEAD_TIMEOUT_S, slots=1) == [2]


def test_a_head_that_goes_away_gives_up_its_place():
    order = Order(total=20, quotas=(20, 20), bounds=(0.5,))
    order.wait(request(1, 12, 0.1), away := request(2, 15, 0.9))
    assert order.admit(START) == [1]
    order.queue.remove(away)
    order.wait(request(3, 16, 0.9), request(4, 4, 0.1))
    assert order.admit(START + HEAD_TIMEOUT_S) == [4]


def blocked_head(**other) -> Order:
    """r0 runs for 50 more tokens; r1's adapter lacks memory, though not quota; r2 is behind it."""
    order = Order(total=20, quotas=(40,), big=12)
    order.wait(request(0, 8, tokens=50))
    assert order.admit() == [0]
    order.wait(request(1, 2, adapter="big"), request(2, 3, tokens=other.pop("tokens", 5)))
    order.running[0].output_token_ids = [0] * other.pop("done", 0)
    return order


def test_a_younger_request_may_pass_a_head_whose_adapter_lacks_memory():
    order = blocked_head()
    assert order.admit() == [2] and order.counters.bypasses == 1
    order.wait(request(3, 1, tokens=1))
    assert order.admit() == []  # one passes already, of two that started


@pytest.mark.parametrize("other", [{"tokens": 50}, {"tokens": 5, "done": 46}])
def test_a_request_that_would_outlast_the_head_s_wait_does_not_pass(other):
    order = blocked_head(**other)
    assert order.admit() == [] and order.counters.bypasses == 0


def test_no_request_passes_a_head_whose_own_tokens_lack_memory():
    order = Order(total=20, quotas=(40,))
    order.wait(request(0, 8, tokens=50))
    order.admit()
    order.wait(request(1, 14), request(2, 3, tokens=5))
    assert order.admit() == [] and order.counters.bypasses == 0


def test_another_request_may_pass_once_one_that_passed_has_ended():
    order = blocked_head()
    assert order.admit() == [2]
    order.end(order.running[1])
    order.wait(request(3, 3, tokens=5))
    assert order.admit() == [3]


def test_a_request_passes_on_its_level_s_quota_only():
    order = Order(total=20, quotas=(8, 40), bounds=(0.5,), big=12)
    order.wait(request(0, 8, 0.9, tokens=50))
    assert order.admit() == [0]
    order.wait(request(1, 2, 0.1, adapter="big"), request(2, 9, 0.1, tokens=5))
    assert order.admit() == []  # the head may exceed the quota, as nothing is charged to it
    order.wait(request(3, 8, 0.1, tokens=5))
    assert order.admit() == [3]


def test_a_bypasser_is_squashed_when_the_head_could_have_its_memory():
    order = blocked_head()
    order.admit()
    passer = order.running[1]
    assert order.queue.victim(10) is None  # 10 and 3 are not the 14 that the head needs
    assert order.queue.victim(14) is None  # it can start anyway
    assert order.queue.victim(11) is passer
    assert order.counters.bypass_squashes == 1
    assert order.queue.victim(11) is None  # no more than SQUASH_SHARE of those that started
    order.end(passer)
    order.wait(request(3, 3, tokens=5))
    assert order.admit() == []  # nor does a further bypasser start, which might be squashed too


def test_queues_report_their_quotas_and_what_is_left_of_them():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(request(1, 8, 0.1), request(2, 8, 0.1), request(3, 30, 0.9))
    assert order.admit() == [1, 3]
    assert order.queue.queues() == (QueueStats("0", 1, 10, 2), QueueStats("1", 0, 20, -10))


def test_upcoming_takes_turns():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(*[request(i, 1, 0.9 if i < 3 else 0.1) for i in range(5)])
    assert [r.order for r in order.queue.upcoming(4)] == [3, 0, 4, 1]
    assert [r.order for r in order.queue.upcoming(10)] == [3, 0, 4, 1, 2]


def test_a_refresh_moves_waiting_and_running_requests():
    order = Order(total=100)
    for number in range(level_planner.FIRST_REFRESH):
        order.wait(request(number, 1 + 9 * (number % 2), 0.9 if number % 2 else 0.1))
    assert sorted(order.admit()) == list(range(18))  # the minima are as 1 to 10, 9 and 91 pages
    assert order.counters.quota_refreshes == order.counters.scaled_quotas == 1
    assert order.queue.bounds == pytest.approx([0.5]) and order.remaining() == [0, 1]
    assert order.admit(START + level_planner.REFRESH_S - 1) == []
    assert order.admit(START + level_planner.REFRESH_S + 1) == [18]  # nothing came of late: one level, one page of it left
    assert order.counters.quota_refreshes == 2 and order.remaining() == [0]
    assert [r.order for r in order.queue.upcoming(100)] == list(range(19, 100))
    for running in list(order.running):
        order.end(running)
    assert order.remaining() == [100]


def test_a_head_s_wait_goes_on_when_levels_are_formed_anew():
    order = Order(total=20, quotas=(20, 40), bounds=(0.5,))
    order.wait(request(0, 12, 0.9))
    assert order.admit() == [0]
    order.wait(request(1, 15, 0.9))
    assert order.admit() == []
    order.wait(*[request(number, 1, 0.1 + 0.8 * (number % 2)) for number in range(2, 2 + level_planner.FIRST_REFRESH)])
    assert order.admit(START + HEAD_TIMEOUT_S) == []
    assert order.counters.quota_refreshes == 1 and len(order.queue.levels) == 2


def test_a_head_blocked_at_time_0_times_out():
    order = Order(total=20, quotas=(20, 20), bounds=(0.5,))
    order.wait(request(1, 12, 0.1))
    order.admit(0.0)
    order.wait(request(2, 15, 0.9))
    order.admit(0.0)
    order.wait(request(4, 1, 0.1))
    assert order.admit(50.0) == []


def test_levels_whose_heads_are_of_a_higher_class_have_the_first_choice_of_room_and_of_loans():
    order = Order(quotas=(10, 20), bounds=(0.5,))
    order.wait(request(1, 4, 0.1, priority=1), request(2, 4, 0.9, priority=1), request(3, 4, 0.9, priority=0))
    assert order.admit(slots=1) == [3]
    assert order.admit() == [1, 2]
    order = Order(quotas=(10, 10, 10), bounds=(0.3, 0.6))
    order.wait(request(1, 10, 0.1), request(2, 10, 0.5), request(3, 10, 0.1, priority=1), request(4, 10, 0.5, priority=0))
    assert order.admit() == [1, 2, 4]  # on the quota of the third level


def test_passes_count_on_when_levels_are_formed_anew():
    order = Order(quotas=(1000,))
    order.wait(request(0, 1, priority=1), *[request(number, 1) for number in range(1, 50)])
    started = [order.admit(slots=1) for _ in range(5)]
    order.wait(*[request(number, 1) for number in range(50, 50 + level_planner.FIRST_REFRESH)])
    started += [order.admit(slots=1) for _ in range(5)]
    assert order.counters.quota_refreshes == 1
    assert started == [*[[number] for number in range(1, MAX_PASSES + 1)], [0]]


def test_a_bypasser_is_squashed_for_a_younger_head_of_a_higher_class():
    order = Order(total=20, quotas=(40,), big=12)
    order.wait(request(0, 8, tokens=50))
    order.admit()
    order.wait(passer := request(1, 3, tokens=5, priority=1), request(2, 2, adapter="big"))
    assert order.admit() == [1] and order.counters.bypasses == 1
    assert order.queue.victim(11) is passer
