"""Adapters that come, change and go while AsyncLLM serves."""

from __future__ import annotations

import asyncio
import threading

import pytest

from chameleon_jax import LoRARequest
from chameleon_jax.errors import QueueFull
from tests import reference_models as reference
from tests.serving.async_calls import GREEDY, LONG, PROMPTS, TIMEOUT, last, run, settled
from tests.serving.conftest import CONFIG


def test_all_have_the_same_content_of_their_adapter(llm, adapter_dir):
    async def main():
        await llm.add_lora("x", adapter_dir / "a1")
        reloads = [llm.add_lora("x", adapter_dir / f"a{i % 2}") for i in range(8)]
        opens = [llm.open_all(PROMPTS[:1], [GREEDY] * 4, LoRARequest("x")) for _ in range(8)]
        mixed = [job for pair in zip(opens, reloads) for job in pair]
        for streams in [result for result in await asyncio.gather(*mixed) if isinstance(result, list)]:
            assert len({stream.request.adapter for stream in streams}) == 1
            for stream in streams:
                stream.close()
        await settled(llm)
        await llm.remove_lora("x")

    run(main())


def test_a_pinned_load_that_is_refused_changes_nothing(llm, adapter_dir, monkeypatch):
    async def main():
        await llm.add_lora("x", adapter_dir / "a1")
        before = llm.engine.adapters.get("x")
        monkeypatch.setattr(type(llm.engine.loop.pool), "capacity", property(lambda pool: 1))
        with pytest.raises(ValueError, match="pinned adapters would take"):
            await llm.add_lora("x", adapter_dir / "a2", pinned=True)
        monkeypatch.undo()
        assert llm.engine.adapters.get("x") is before
        await llm.add_lora("x", adapter_dir / "a2", pinned=True)
        assert [a.pinned for a in (await llm.stats(max_age=0)).adapters if "x" in a.names] == [True]
        await llm.pin_lora("x", False)
        await llm.remove_lora("x")

    run(main())


def test_adapters_come_change_and_go_while_requests_run(llm, tmp_path):
    reference.save_adapter(tmp_path / "new", CONFIG, 8, seed=77)

    async def main():
        ask = LoRARequest("x")
        before = len((await llm.stats(max_age=0)).adapters)
        assert not await llm.add_lora("x", llm.engine.adapters.path("a1"))
        assert await llm.add_lora("x", llm.engine.adapters.path("a1"))  # the very content
        old = (await last(llm, PROMPTS[0], LONG, ask)).outputs[0].text
        running = await llm.open(PROMPTS[0], LONG, ask)
        await anext(running)
        assert not await llm.add_lora("x", tmp_path / "new")  # while it runs
        new = (await last(llm, PROMPTS[0], LONG, ask)).outputs[0].text
        async for _ in running:
            pass
        assert running.output().outputs[0].text == old != new
        running = await llm.open(PROMPTS[0], LONG, ask)
        await llm.remove_lora("x")
        assert "x" not in await llm.list_loras()
        with pytest.raises(KeyError):
            await llm.open(PROMPTS[0], LONG, ask)
        async for _ in running:
            pass
        assert running.output().outputs[0].text == new
        await settled(llm)
        assert len((await llm.stats(max_age=0)).adapters) == before  # nothing is kept of it
        with pytest.raises(KeyError):
            await llm.remove_lora("x")

    run(main())


def test_steps_go_on_while_an_adapter_is_read(llm, monkeypatch, adapter_dir):
    """SGLang #8162: the server stalls while an adapter loads. Here reading and packing are in another thread."""
    gate, reading = threading.Event(), threading.Event()
    read = llm.engine.packer.read

    def slow(name, path):
        reading.set()
        assert gate.wait(TIMEOUT)
        return read(name, path)

    async def main():
        monkeypatch.setattr(llm.engine.packer, "read", slow)
        load = asyncio.create_task(llm.add_lora("slow", adapter_dir / "a2"))
        while not reading.is_set():
            await asyncio.sleep(0.001)
        assert (await last(llm, PROMPTS[0], LONG, LoRARequest("a1"))).finished and not load.done()
        gate.set()
        await load
        await llm.remove_lora("slow")

    run(main())


def test_loads_that_wait_have_an_end(own_llm, monkeypatch, adapter_dir):
    llm = own_llm(max_lora_loads=1, max_lora_queue=2)
    gate = threading.Event()
    read = llm.engine.packer.read
    monkeypatch.setattr(llm.engine.packer, "read", lambda *args: (gate.wait(TIMEOUT), read(*args))[1])

    async def main():
        loads = [asyncio.create_task(llm.add_lora(f"x{i}", adapter_dir / "a0")) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="max_lora_queue"):
            await llm.add_lora("x3", adapter_dir / "a0")
        gate.set()
        assert await asyncio.gather(*loads) == [False] * 3
        await llm.add_lora("x3", adapter_dir / "a0")

    run(main())
