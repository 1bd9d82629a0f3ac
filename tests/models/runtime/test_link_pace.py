"""Pieces sent beside steps follow the link's rate and the steps' length, stay in bounds and come behind a step's inputs."""

from __future__ import annotations

from collections import deque
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES, PieceSizes
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.link_pace import LINK_SHARE, REMEMBERED_STEPS, TRIP_STEPS, LinkPace
from chameleon_jax.models.runtime.model_runner import DispatchedStep, RunningStep
from chameleon_jax.models.runtime.step_inputs import PackedStep
from chameleon_jax.scheduler import StepPlan
from tests.chameleon_jax.loop_traffic import make_request
from tests.models.runtime.adapter_link import LINK_RATE, LOAD_PAGES, PAGE_BYTES, PIECE_BYTES, Bench, FakeDevice
from tests.properties import examples

GIB = 1 << 30
PACE = LINK_SHARE * LINK_RATE
"""Bytes a second that are sent beside steps."""
LARGE = PieceSizes(PAGE_BYTES, LOAD_PAGES, max_bytes=64 * PIECE_BYTES)


def pace_of(seconds: list[float], rate: float = LINK_RATE, max_bytes: int = GIB) -> LinkPace:
    """Make a pace after dispatches `seconds` apart."""
    pace, now = LinkPace(rate, max_bytes), 50.0
    for step in [0.0, 0.0, *seconds]:  # the first two come before the device works all the time
        now += step
        pace.dispatched(now)
    return pace


@pytest.mark.parametrize(
    "rate,step,window",
    [
        (25e9, 0.001, MIN_TRANSFER_BYTES),
        (25e9, 0.008, 200_000_000),
        (25e9, 0.020, 500_000_000),
        (55e9, 0.004, 220_000_000),
        (55e9, 0.040, GIB),
        (0.0, 0.020, MIN_TRANSFER_BYTES),
    ],
)
def test_the_window_holds_two_steps_of_transfers_within_bounds(rate, step, window):
    pace = pace_of([step] * 5, rate)
    assert pace.step_bytes == pytest.approx(LINK_SHARE * rate * step, abs=10)
    assert pace.window == pytest.approx(window, abs=100)
    assert pace_of([step] * 5, rate, max_bytes=200 << 20).window <= 200 << 20


def test_the_shortest_of_the_last_steps_counts():
    assert pace_of([0.02, 0.004, 9.0]).step_bytes == pytest.approx(PACE * 0.004)
    forgotten = [0.004, *[0.01] * REMEMBERED_STEPS]
    assert pace_of(forgotten).step_bytes == pytest.approx(PACE * 0.01)


def test_a_pause_is_no_step_and_neither_are_two_dispatches_after_it():
    pace = pace_of([0.008] * 2)
    pace.paused()
    for now in (1000.0, 1000.001, 1000.009):
        pace.dispatched(now)
    assert pace.step_bytes == pytest.approx(PACE * 0.008)
    assert LinkPace(LINK_RATE, GIB).step_bytes == 0


def sent_by_steps(bench: Bench, seconds: list[float]) -> list[int]:
    """Count the bytes sent by each step, where nothing arrives meanwhile."""
    sent, before = [], sum(event.nbytes for event in bench.device.link)
    for step in seconds:
        bench.step(step)
        total = sum(event.nbytes for event in bench.device.link)
        sent.append(total - before)
        before = total
    return sent


def test_a_step_is_followed_by_its_share_of_transfers():
    step = 4.6 * PIECE_BYTES / PACE
    bench = Bench(pieces=LARGE)
    bench.begin_beside_steps(1, 100 * LOAD_PAGES)
    sent = [n / PIECE_BYTES for n in sent_by_steps(bench, [step] * 8)]
    assert sent[:4] == [1, 1, 4, 3]  # a piece until a step's length is known, in the end the room of two steps
    assert sum(sent) == int(TRIP_STEPS * 4.6) == 9
    bench.device.arrive(4)
    assert sent_by_steps(bench, [step]) == [4 * PIECE_BYTES]


def test_a_step_shorter_than_a_piece_is_followed_by_one_piece():
    bench = Bench(pieces=LARGE)
    bench.begin_beside_steps(1, 100 * LOAD_PAGES)
    assert sent_by_steps(bench, [1e-4] * 6) == [PIECE_BYTES] * 4 + [0] * 2
    assert bench.loads.bytes_on_the_way == MIN_TRANSFER_BYTES


def test_beginning_and_polling_send_nothing_beside_steps():
    bench = Bench()
    bench.step(0.01)
    bench.begin_beside_steps(1, 3)
    assert bench.loads.poll() == [] and not bench.device.link
    bench.step(0.01)
    assert len(bench.device.link) > 0


def test_a_load_is_finished_by_waiting_where_no_step_follows():
    bench = Bench()
    bench.step(0.01)
    bench.begin_beside_steps(1, 40)
    assert bench.names(bench.loads.poll(wait=True)) == ["1"]
    bench.check("1", 1)


def test_pieces_that_wait_to_be_written_leave_room_for_no_others():
    bench = Bench()  # 8 pieces may be on the device
    bench.begin_beside_steps(1, 30 * LOAD_PAGES)
    for _ in range(20):  # the device executes nothing
        bench.step(1.0)
        bench.device.arrive(100)
        assert bench.device.held <= bench.device.pieces.device_bytes
    assert len(bench.device.link) == 8 and len(bench.device.writes) == 8
    bench.device.run()
    bench.step(1.0)
    assert len(bench.device.link) == 16


class Link:
    """Link that moves pieces at a rate, one by one. A piece starts when the step that ran when it was sent has ended."""

    def __init__(self, bench: Bench, rate: float):
        self._bench, self._rate, self._free = bench, rate, 0.0
        self._ends: deque[tuple[float, Any]] = deque()
        self._seen = 0

    def send(self, start: float) -> None:
        for event in self._bench.device.link[self._seen :]:
            self._free = max(self._free, start) + event.nbytes / self._rate
            self._ends.append((self._free, event))
        self._seen = len(self._bench.device.link)

    def move(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self._ends.popleft()[1].happened = True


@examples(60)
@given(
    step=st.floats(0.002, 0.04),
    rate=st.floats(5e9, 60e9),
    true_rate=st.floats(0.2, 1.5),
    limit=st.integers(4, 64),
    data=st.data(),
)
def test_a_step_is_followed_by_its_share_of_transfers_at_most_and_memory_is_bounded(step, rate, true_rate, limit, data):
    bench = Bench(pieces=PieceSizes(PAGE_BYTES, LOAD_PAGES, max_bytes=limit * PIECE_BYTES), link_rate=rate)
    link = Link(bench, rate * true_rate)
    bench.begin_beside_steps(1, 200 * LOAD_PAGES)
    executing: list[Any] = []
    for _ in range(40):
        for write in executing:
            write.happened = True
        executing = [write for write in bench.device.writes if not write.happened]
        before = len(bench.device.link)
        length = step * data.draw(st.floats(1.0, 1.5))
        link.move(bench.now + length)
        bench.step(length)
        sent = sum(event.nbytes for event in bench.device.link[before:])
        assert sent <= max(LINK_SHARE * rate * 1.5 * step, PIECE_BYTES)
        link.send(bench.now + step)  # behind the step that runs
        assert bench.device.held <= bench.device.pieces.device_bytes
        assert bench.loads.bytes_on_the_way <= max(MIN_TRANSFER_BYTES, TRIP_STEPS * LINK_SHARE * rate * 1.5 * step)


@pytest.mark.parametrize("step", [0.008, 0.02])
def test_pieces_keep_their_share_of_the_link_all_the_time_where_memory_allows(step):
    bench = Bench(pieces=LARGE)
    link = Link(bench, LINK_RATE)
    bench.begin_beside_steps(1, 1000 * LOAD_PAGES)
    for i in range(60):
        if i == 20:
            sent = len(bench.device.link)
        bench.device.run()
        link.move(bench.now + step)
        bench.step(step)
        link.send(bench.now + step)
    rate = (len(bench.device.link) - sent) * PIECE_BYTES / (40 * step)
    assert rate > 0.6 * PACE  # whole pieces only: 2 of 2.98 a step of 8 ms


class RecordingDevice(FakeDevice):
    """Record steps and pieces in the order in which they are sent."""

    def __init__(self):
        super().__init__()
        self.order: list[str] = []

    def send(self, chunks, sampling_rows) -> int:
        self.order.append("inputs")
        return len(chunks)

    def forward(self, sent: int) -> RunningStep:
        self.order.append("step")
        return RunningStep(PackedStep(None, None, list(range(sent)), None), [], None, None, False)

    def sample(self, running: RunningStep, masks: None) -> DispatchedStep:
        return DispatchedStep(None, jnp.zeros(()))

    def put(self, piece):
        self.order.append("piece")
        return super().put(piece)

    def reset(self) -> None:
        self.order.append("reset")


@pytest.fixture
def executor() -> tuple[JaxExecutor, RecordingDevice, Bench]:
    bench, device = Bench(), RecordingDevice()
    bench.device = device
    made = JaxExecutor(device, bench.store)  # type: ignore[arg-type]
    made._placements = dict.fromkeys(("1", "2"))  # type: ignore[arg-type]
    bench.loads = made._loads
    return made, device, bench


def begin(executor: JaxExecutor, bench: Bench, number: int, num_pages: int) -> None:
    name = bench.stage(number, num_pages)
    executor.begin_load(name, bench.pages[name])


def plan() -> StepPlan:
    request = make_request(0, 5, 4)
    request.slot, request.num_computed, request.seed = 0, 5, 0
    return StepPlan(decodes=[request])


def test_new_pieces_are_sent_behind_a_steps_inputs_and_ahead_of_its_programs(executor):
    made, device, bench = executor
    first = made.dispatch(plan())
    begin(made, bench, 1, 20)
    assert made.poll_loads() == [] and device.order == ["inputs", "step"]
    second = made.dispatch(plan())
    assert device.order[2:] == ["inputs", "piece", "step"]
    made.collect(first)
    assert made.poll_loads() == [] and len(device.order) == 5  # the second one still runs
    made.collect(second)
    made.poll_loads()
    assert set(device.order[5:]) == {"piece"} and len(device.order) > 5


@pytest.mark.parametrize("wait", [False, True])
def test_where_nothing_runs_polling_sends(executor, wait):
    made, device, bench = executor
    begin(made, bench, 1, 20)
    assert device.order == []
    ended = made.poll_loads(wait)
    assert set(device.order) == {"piece"} and [result.content_hash for result in ended] == (["1"] if wait else [])


def test_after_a_reset_nothing_runs(executor):
    made, device, bench = executor
    made.dispatch(plan())
    made.reset()
    begin(made, bench, 1, 3)
    made.poll_loads()
    assert device.order == ["inputs", "step", "reset", "piece", "piece"]


def test_an_interrupted_collect_can_be_repeated(executor, monkeypatch):
    made, device, bench = executor
    handle = made.dispatch(plan())
    begin(made, bench, 1, 3)
    monkeypatch.setattr("jax.block_until_ready", lambda value: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.collect(handle)
    monkeypatch.undo()
    made.poll_loads()
    assert device.order == ["inputs", "step"]
    made.collect(handle)
    made.collect(handle)
    made.poll_loads()
    assert device.order == ["inputs", "step", "piece", "piece"]
    assert not np.any([event.blocked for event in device.link])
