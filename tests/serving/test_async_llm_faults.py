"""AsyncLLM on a device that fails or hangs, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from chameleon_jax import AsyncLLM, LoRARequest
from chameleon_jax.errors import Draining, EngineDead
from tests.engines import SETTINGS
from tests.serving.async_calls import LONG, PROMPTS, TIMEOUT, Watcher, last, run, settled


def broken(method, times: int | None):
    """Raises so many times, None: always."""
    left = [times]

    def call(*args, **kwargs):
        if left[0] is None or left[0] > 0:
            left[0] = left[0] and left[0] - 1
            raise RuntimeError("device lost")
        return method(*args, **kwargs)

    return call


@pytest.mark.parametrize("method", ["dispatch", "collect"])
def test_a_step_that_raises_once(own_llm, monkeypatch, method, adapter_dir):
    llm = own_llm()
    executor = llm.engine.loop.executor

    async def main():
        await llm.add_lora("a1", adapter_dir / "a1")
        jobs = [(prompt, lora) for prompt in PROMPTS * 2 for lora in (None, LoRARequest("a1"))]  # more than run at once
        expected = [(await last(llm, p, LONG, lora)).outputs[0].text for p, lora in jobs[:4]]
        streams = [await llm.open(p, LONG, lora) for p, lora in jobs]
        await anext(streams[0])
        monkeypatch.setattr(executor, method, broken(getattr(executor, method), 1))
        for stream in streams:
            async for _ in stream:
                pass
        assert [s.output().outputs[0].text for s in streams[:4]] == expected
        assert all(s.output().outputs[0].finish_reason == "length" for s in streams)
        stats = await llm.stats(max_age=0)
        assert (stats.loop.faults, stats.pool.kv) == (1, 0) and llm.error is None

    run(main())


def test_a_step_that_always_raises(own_llm, monkeypatch):
    llm = own_llm()
    executor = llm.engine.loop.executor
    watcher = Watcher()
    llm.observers.append(watcher)

    async def main():
        streams = [await llm.open(PROMPTS[0], LONG) for _ in range(12)]
        monkeypatch.setattr(executor, "dispatch", broken(executor.dispatch, None))
        for stream in streams:
            with pytest.raises(EngineDead, match="device lost"):
                async for _ in stream:
                    pass
        assert isinstance(llm.error, EngineDead) and watcher.lost_requests == [12]
        with pytest.raises(EngineDead, match="device lost"):
            await llm.open(PROMPTS[0], LONG)
        with pytest.raises(EngineDead):
            await llm.list_loras()
        await llm.drain(1)  # nothing hangs at the end either

    run(main())


def test_a_step_that_hangs(own_llm, monkeypatch):
    llm = own_llm(step_timeout=0.5)
    gate = threading.Event()
    collect = llm.engine.loop.executor.collect
    monkeypatch.setattr(llm.engine.loop.executor, "collect", lambda handle: (gate.wait(TIMEOUT), collect(handle))[1])

    async def main():
        await llm.stats()
        stream = await llm.open(PROMPTS[0], LONG)
        with pytest.raises(EngineDead, match="hangs"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead, match="hangs"):
            await llm.stats()
        assert llm.last_stats.running == 0
        gate.set()

    run(main())


def test_drain_finishes_what_runs(own_llm):
    llm = own_llm()

    async def main():
        streams = [await llm.open(PROMPTS[0], LONG) for _ in range(12)]
        readers = [asyncio.create_task(_read(stream)) for stream in streams]
        assert await llm.drain(TIMEOUT)
        assert {await reader for reader in readers} == {"length"}
        with pytest.raises(Draining):
            await llm.open(PROMPTS[0], LONG)

    run(main())


def test_drain_gives_up_in_time(own_llm, monkeypatch):
    llm = own_llm()
    collect = llm.engine.loop.executor.collect
    monkeypatch.setattr(llm.engine.loop.executor, "collect", lambda handle: (time.sleep(0.1), collect(handle))[1])

    async def main():
        readers = [asyncio.create_task(_read(await llm.open(PROMPTS[0], LONG))) for _ in range(3)]
        assert not await llm.drain(0.3)
        assert {type(e) for e in await asyncio.gather(*readers, return_exceptions=True)} == {Draining}
        await settled(llm)

    run(main())


async def _read(stream) -> str | None:
    return [delta async for delta in stream][-1].finish_reason


def test_nothing_is_left_behind(text_model):
    """Threads and streams of an engine that is closed while requests run."""
    before = set(threading.enumerate())

    async def main():
        async with AsyncLLM(str(text_model), **SETTINGS) as llm:
            stream = await llm.open(PROMPTS[0], LONG)
        with pytest.raises(EngineDead, match="closed"), contextlib.closing(stream):
            async for _ in stream:
                pass

    run(main())
    gc.collect()
    assert {
        thread for thread in set(threading.enumerate()) - before if "engine" in thread.name or "lora" in thread.name
    } == set()
