"""A batch admits requests only where the cache can then free their memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.admission import MAX_LOADS, AdmissionBatch, Verdict
from tests.properties import examples


def request(number: int, prompt: int = 4, adapter: str | None = None) -> Request:
    made = Request(f"r{number}", [1] * prompt, SamplingParams(), arrival_time=0.0, seed=0, adapter=adapter, order=number)
    return made


def make_batch(cache: AdapterCache, slots: int = 100, prompt_room: float = 1e9, overlap_loads: bool = False) -> AdmissionBatch:
    return AdmissionBatch(cache, slots, prompt_room, lambda r: r.num_known, overlap_loads)


def make_cache(num_pages: int, **adapters: tuple[int, str]) -> AdapterCache:
    """Cache with adapters, given by name as pages and one of host, loading, idle, used, pinned."""
    cache = AdapterCache(PagePool(num_pages))
    for name, (pages, state) in adapters.items():
        cache.add(AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages), 0.0)
        if state == "host" or not cache.pool.can_allocate(pages):
            continue
        cache.begin_load(name)
        if state != "loading":
            cache.finish_load(name)
        if state == "used":
            cache.acquire(name, 0.0)
        if state == "pinned":
            cache.pin(name)
    return cache


STATES = st.sampled_from(["host", "host", "loading", "idle", "idle", "used", "pinned"])


@examples(300)
@given(
    num_pages=st.integers(5, 60),
    adapters=st.lists(st.tuples(st.integers(1, 12), STATES), min_size=5, max_size=5),
    kv=st.integers(0, 30),
    offers=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([*"abcde", None]), st.integers(1, 40)), max_size=20),
    slots=st.integers(0, 8),
    prompt_room=st.integers(0, 120),
    overlap_loads=st.booleans(),
    wanted=st.sets(st.sampled_from("abcde")),
)
def test_an_admitted_batch_fits_the_pool(num_pages, adapters, kv, offers, slots, prompt_room, overlap_loads, wanted):
    cache = make_cache(num_pages, **dict(zip("abcde", adapters)))
    pool = cache.pool
    pool.extend_kv("running", min(kv, pool.num_free))
    batch = make_batch(cache, slots, prompt_room, overlap_loads)
    for number, (kv_pages, adapter, prompt) in enumerate(offers):
        before, taken = batch.room(), (batch.pages, len(batch.starts), len(batch.loads))
        made = request(number, prompt, adapter)
        verdict = batch.try_admit(made, kv_pages)
        assert batch.room() >= 0
        if verdict is Verdict.STARTS:
            assert batch.starts[-1] is made and before - batch.room() >= kv_pages
        elif verdict is not Verdict.WAITS:
            assert (batch.pages, len(batch.starts), len(batch.loads)) == taken
            assert verdict is Verdict.FULL or batch.lacks_memory
    assert len(batch.starts) <= slots and len(batch.loads) == len(set(batch.loads))
    assert sum(r.num_known for r in batch.starts[:-1]) < max(prompt_room, 1)
    if overlap_loads:
        assert cache.num_loading + len(batch.loads) <= max(MAX_LOADS, cache.num_loading)
        assert all(r.adapter is None or cache.entry(r.adapter).tier is AdapterTier.RESIDENT for r in batch.starts)
    # and now it is committed, as the scheduler does
    pages = dict(zip((r.request_id for r in batch.starts), (offers[r.order][0] for r in batch.starts)))
    assert batch.pages == sum(pages.values()) + sum(cache.entry(a).info.num_pages for a in batch.loads)
    assert cache.reserve(batch.pages, 1.0, keep=batch.keep, wanted=wanted)
    for adapter in batch.loads:
        cache.begin_load(adapter)
    for made in batch.starts:
        if made.adapter is not None:
            cache.acquire(made.adapter, 1.0)  # raises where it was evicted
        pool.extend_kv(made.request_id, pages[made.request_id])


def test_verdicts_name_the_missing_memory():
    cache = make_cache(11, big=(8, "host"), idle=(3, "idle"))
    batch = make_batch(cache)
    assert batch.room() == 10
    assert batch.try_admit(request(0), 11) is Verdict.NO_MEMORY
    assert batch.try_admit(request(1, adapter="big"), 11) is Verdict.NO_MEMORY
    assert batch.try_admit(request(2, adapter="big"), 3) is Verdict.NO_ADAPTER_MEMORY
    assert batch.try_admit(request(3, adapter="idle"), 8) is Verdict.NO_MEMORY  # its adapter must stay
    assert batch.try_admit(request(4, adapter="idle"), 7) is Verdict.STARTS
    assert (batch.room(), batch.pages, set(batch.keep), batch.loads) == (0, 7, {"idle"}, [])
    assert batch.lacks_memory


def test_an_adapter_is_counted_once_a_batch():
    cache = make_cache(21, cold=(8, "host"), warm=(4, "idle"))
    batch = make_batch(cache)
    assert [batch.try_admit(request(i, adapter="cold"), 2) for i in range(2)] == [Verdict.STARTS] * 2
    assert [batch.try_admit(request(i, adapter="warm"), 2) for i in range(2)] == [Verdict.STARTS] * 2
    assert (batch.room(), batch.pages, batch.loads) == (0, 16, ["cold"])


def test_slots_and_prompt_room_fill_a_batch():
    cache = make_cache(50)
    batch = make_batch(cache, slots=2)
    assert [batch.try_admit(request(i), 1) for i in range(3)] == [Verdict.STARTS, Verdict.STARTS, Verdict.FULL]
    batch = make_batch(cache, prompt_room=10)
    assert [batch.try_admit(request(i, prompt=6), 1) for i in range(3)] == [Verdict.STARTS, Verdict.STARTS, Verdict.FULL]
    assert make_batch(cache, prompt_room=0).try_admit(request(0), 1) is Verdict.FULL
    assert not batch.lacks_memory


def test_tokens_in_flight_hold_a_preempted_request_back():
    batch = make_batch(make_cache(50))
    preempted = request(0)
    preempted.num_in_flight = 1
    assert batch.try_admit(preempted, 1) is Verdict.WAITS
    preempted.num_in_flight = 0
    assert batch.try_admit(preempted, 1) is Verdict.STARTS


def test_overlapping_loads_begin_and_their_requests_wait():
    cache = make_cache(30, **{name: (2, "host") for name in "abcdef"}, hot=(3, "loading"))
    batch = make_batch(cache, overlap_loads=True)
    assert batch.try_admit(request(0, adapter="hot"), 1) is Verdict.WAITS
    assert [batch.try_admit(request(i, adapter=name), 1) for i, name in enumerate("aabcdef")] == [Verdict.WAITS] * 7
    assert batch.loads == ["a", "b", "c"]  # with `hot` MAX_LOADS
    assert (batch.starts, batch.pages) == ([], 6)
    crowded = make_batch(make_cache(5, big=(5, "host")), overlap_loads=True)
    assert crowded.try_admit(request(0, adapter="big"), 1) is Verdict.NO_ADAPTER_MEMORY and crowded.lacks_memory


def test_the_first_offer_records_whether_the_adapter_was_resident():
    cache = make_cache(30, warm=(2, "idle"), cold=(2, "host"))
    batch = make_batch(cache)
    requests = [request(0, adapter="warm"), request(1, adapter="cold"), request(2)]
    for made in requests:
        batch.try_admit(made, 1)
    assert [r.metrics.adapter_was_resident for r in requests] == [True, False, None]
