"""Sampling of steps: drawn at the dispatch or later, with counts for penalties, and masks."""

from __future__ import annotations

import sys
import types
from array import array
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.sampling import Sampled, SamplingMode, mask_of
from chameleon_jax.models.runtime.buckets import Program
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.model_runner import DispatchedStep, RunningStep
from chameleon_jax.models.runtime.step_inputs import PackedStep, SamplingRow
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan
from tests.models.runtime.adapter_link import Bench, FakeDevice

VOCAB = 40


class SamplingDevice(FakeDevice):
    """Record what is sampled and counted; sample token 7 everywhere."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def send(self, chunks: list[Any], sampling_rows: dict[int, SamplingRow]) -> RunningStep:
        step = PackedStep(None, Program(len(chunks), len(chunks), 0, 0), list(range(len(chunks))), SamplingMode.GREEDY)
        rows = list(sampling_rows.values())
        return RunningStep(step, rows, None, None, any(row.adjustment is not None for row in rows))

    def forward(self, sent: RunningStep) -> RunningStep:
        self.calls.append(("forward", sent.step.program.tokens))
        return sent

    def sample(self, running: RunningStep, masks: np.ndarray | None) -> DispatchedStep:
        self.calls.append(("sample", None if masks is None else masks.tolist()))
        tokens = jnp.full(len(running.rows) + 1, 7)  # a row of padding
        return DispatchedStep(Sampled(tokens), tokens)

    def no_masks(self, rows: int) -> np.ndarray:
        return np.full((rows, 2), -1, np.int32)

    def count(self, slot: int, prompt: list[int], output: list[int]) -> None:
        self.calls.append(("count", slot, list(prompt), list(output)))

    def reset(self) -> None:
        pass


class GuideOf:
    """Guide whose mask is given, in place of one that llguidance fills."""

    def __init__(self, token: int):
        self.token = token


@pytest.fixture
def device() -> SamplingDevice:
    return SamplingDevice()


@pytest.fixture
def executor(device, monkeypatch) -> JaxExecutor:
    def fill_masks(guides, masks):
        for row, guide in guides:
            masks[row] = mask_of([guide.token], VOCAB)

    stand_in = types.SimpleNamespace(fill_masks=fill_masks)  # the module's package is not on every machine
    monkeypatch.setitem(sys.modules, "chameleon_jax.structured_outputs", stand_in)
    return JaxExecutor(device, Bench().store)


def request(slot: int = 0, output: tuple[int, ...] = (), **params: Any) -> Request:
    made = Request(f"r{slot}", [1, 2, 3], SamplingParams(max_tokens=20, **params), arrival_time=0.0, seed=0)
    made.slot, made.pages, made.num_computed = slot, array("i", [1]), 4
    made.output_token_ids.extend(output)
    return made


def guided(slot: int, token: int) -> Request:
    made = request(slot)
    made.guide, made.adjusts = GuideOf(token), True
    return made


def names(device: SamplingDevice) -> list[str]:
    return [call[0] for call in device.calls]


def prefill(one: Request) -> PrefillChunk:
    return PrefillChunk(one, 0, 3, samples=True)


def test_a_plain_step_is_drawn_at_its_dispatch_without_masks_and_counts(executor, device):
    handle = executor.dispatch(StepPlan(decodes=[request(0), request(1)]))
    executor.draw(handle)
    assert device.calls == [("forward", 2), ("sample", None)]
    assert [sampled.token_id for sampled in executor.collect(handle)] == [7, 7]


def test_a_step_with_guided_rows_is_drawn_later(executor, device):
    handle = executor.dispatch(StepPlan(prefills=[prefill(guided(0, 5))], decodes=[request(1)]))
    assert device.calls == [("forward", 2)]
    executor.draw(handle)
    executor.draw(handle)  # nothing is left to draw
    assert device.calls[1:] == [("sample", [[-1, -1], mask_of([5], VOCAB).tolist()])]
    assert [sampled.request.slot for sampled in executor.collect(handle)] == [1, 0]


def test_a_step_of_decodes_and_prompts_is_one(executor, device):
    begun = PrefillChunk(request(2), 0, 2, samples=False)
    handle = executor.dispatch(StepPlan(prefills=[begun, prefill(request(0))], decodes=[request(1), request(3)]))
    assert device.calls == [("forward", 4), ("sample", None)]
    assert [sampled.request.slot for sampled in executor.collect(handle)] == [1, 3, 0]


def test_masks_of_a_mixed_batch(executor, device):
    one = request(1, allowed_token_ids=[4, 9])
    one.allowed = mask_of([4, 9], VOCAB)
    both = guided(2, 9)
    both.allowed = mask_of([9, 10], VOCAB)
    handle = executor.dispatch(StepPlan(decodes=[guided(0, 5), one, both, request(3)]))
    executor.draw(handle)
    [_, (_, masks)] = device.calls
    assert masks == [mask_of(ids, VOCAB).tolist() for ids in ([5], [4, 9], [9])] + [[-1, -1]]


def test_a_guided_request_that_ended_before_its_draw_masks_nothing(executor, device):
    ended = guided(0, 5)
    handle = executor.dispatch(StepPlan(decodes=[ended, guided(1, 6)]))
    ended.finish_reason, ended.slot = FinishReason.ABORT, -1
    executor.draw(handle)
    assert device.calls[-1] == ("sample", [[-1, -1], mask_of([6], VOCAB).tolist()])


@pytest.mark.parametrize(
    ("params", "counted"),
    [
        ({"presence_penalty": 1.0}, [("count", 0, [], [8, 9])]),
        ({"frequency_penalty": -1.0}, [("count", 0, [], [8, 9])]),
        ({"repetition_penalty": 1.1}, [("count", 0, [1, 2, 3], [8, 9])]),
        ({"logit_bias": {3: 1.0}}, []),
        ({}, []),
    ],
)
def test_tokens_are_counted_once_where_a_penalty_needs_them(executor, device, params, counted):
    one = request(output=(8, 9), **params)
    for _ in range(3):
        executor.collect(executor.dispatch(StepPlan(decodes=[one])))
    assert [call for call in device.calls if call[0] == "count"] == counted
    assert names(device)[-2:] == ["forward", "sample"]


def test_tokens_are_counted_again_after_a_preemption_another_owner_of_the_slot_and_a_reset(executor, device):
    one, other = request(presence_penalty=1.0), request(presence_penalty=1.0, output=(4,))

    def step(of: Request) -> list[tuple[Any, ...]]:
        device.calls.clear()
        executor.collect(executor.dispatch(StepPlan(decodes=[of])))
        return [call for call in device.calls if call[0] == "count"]

    assert step(one) == [("count", 0, [], [])] and step(one) == []
    one.metrics.num_preemptions += 1
    one.output_token_ids.append(6)
    assert step(one) == [("count", 0, [], [6])] and step(one) == []
    assert step(other) == [("count", 0, [], [4])]
    assert step(one) == [("count", 0, [], [6])]
    executor.reset()
    assert step(one) == [("count", 0, [], [6])]


def test_a_request_that_ended_before_its_draw_is_not_counted(executor, device):
    ended = request(0, presence_penalty=1.0)
    handle = executor.dispatch(StepPlan(decodes=[ended, guided(1, 6)]))
    ended.finish_reason, ended.slot = FinishReason.ABORT, -1
    executor.draw(handle)
    assert "count" not in names(device)
