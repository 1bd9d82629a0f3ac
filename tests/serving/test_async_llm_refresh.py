"""Names that are given new content again and again while requests run, as training loops do at every step."""

from __future__ import annotations

import asyncio
import collections
import itertools
import shutil
import threading

import numpy as np
import pytest

from chameleon_jax import LoRARequest
from tests import reference_models as reference
from tests.serving.async_calls import GREEDY, LONG, PROMPTS, TIMEOUT, last, run, settled
from tests.serving.conftest import CONFIG


@pytest.fixture
def steps(tmp_path):
    """Directories of four contents of rank 8, then one of rank 40."""
    return [reference.save_adapter(tmp_path / f"s{i}", CONFIG, (8, 8, 8, 8, 40)[i], seed=50 + i) for i in range(5)]


async def pins(llm) -> dict[str, bool]:
    return {name: a.pinned for a in (await llm.stats(max_age=0)).adapters for name in a.names}


async def remove(llm, *names):
    for name in names:
        await llm.remove_lora(name)
    await settled(llm)


def test_a_refreshed_name_keeps_its_pin_until_it_is_told_otherwise(llm, steps):
    async def main():
        await llm.add_lora("x", steps[0], pinned=True)
        for path in (steps[1], steps[1], steps[2]):
            await llm.add_lora("x", path)
            assert (await pins(llm))["x"]
        await llm.add_lora("x", steps[3], pinned=False)
        assert not (await pins(llm))["x"]
        await llm.add_lora("x", steps[0])
        assert not (await pins(llm))["x"]
        await llm.pin_lora("x")
        await llm.add_lora("x", steps[0], pinned=False)  # the same content
        assert not (await pins(llm))["x"]
        await remove(llm, "x")
        await llm.add_lora("x", steps[0])  # another of that name
        assert not (await pins(llm))["x"]
        await remove(llm, "x")

    run(main())


def test_the_place_of_what_is_replaced_counts_as_free(llm, steps, monkeypatch):
    """Half of the pool may be pinned: two of rank 40 would be more than that."""

    async def main():
        await llm.add_lora("x", steps[4], pinned=True)
        pages = llm.engine.adapters.get("x").num_pages
        monkeypatch.setattr(type(llm.engine.loop.pool), "capacity", property(lambda pool: 3 * pages))
        reference.save_adapter(steps[4], CONFIG, 40, seed=99)
        await llm.add_lora("x", steps[4])
        assert (await pins(llm))["x"]
        await llm.add_lora("y", steps[4])  # the same content by another name
        await llm.pin_lora("y")
        reference.save_adapter(steps[4], CONFIG, 40, seed=100)
        with pytest.raises(ValueError, match="pinned adapters would take"):
            await llm.add_lora("x", steps[4])  # y keeps the old one
        assert await pins(llm) == {**await pins(llm), "x": True, "y": True}
        monkeypatch.undo()
        await remove(llm, "x", "y")

    run(main())


def test_a_content_is_pinned_while_one_of_its_names_pins_it(llm, steps):
    async def main():
        await llm.add_lora("x", steps[0])
        await llm.add_lora("y", steps[0], pinned=True)
        assert (await pins(llm))["x"]
        await llm.pin_lora("x")
        await llm.pin_lora("y", False)
        assert (await pins(llm))["x"]
        await llm.pin_lora("y")
        await llm.remove_lora("x")
        assert (await pins(llm))["y"]
        await llm.add_lora("x", steps[0])
        await llm.remove_lora("y")
        assert not (await pins(llm))["x"]  # only y had pinned it
        await llm.add_lora("y", steps[0], pinned=True)
        await llm.add_lora("y", steps[1])
        assert await pins(llm) == {**await pins(llm), "x": False, "y": True}
        await remove(llm, "x", "y")

    run(main())


def test_a_directory_that_was_overwritten_is_read_again(llm, steps, tmp_path):
    async def main():
        path = tmp_path / "policy"
        answers = []
        for step in steps[:3]:
            shutil.copytree(step, path, dirs_exist_ok=True)
            assert not await llm.add_lora("x", path)
            answers.append((await last(llm, PROMPTS[0], GREEDY, LoRARequest("x"))).outputs[0].text)
        assert len(set(answers)) == 3
        shutil.copytree(steps[0], path, dirs_exist_ok=True)
        known = LoRARequest("x", str(path))
        assert (await last(llm, PROMPTS[0], GREEDY, known)).outputs[0].text == answers[2]  # read from there before
        anew = LoRARequest("x", str(path), load_inplace=True)
        assert (await last(llm, PROMPTS[0], GREEDY, anew)).outputs[0].text == answers[0]
        await remove(llm, "x")

    run(main())


def test_a_refresh_that_fails_leaves_the_old_content(llm, steps, tmp_path):
    async def main():
        path = tmp_path / "policy"
        shutil.copytree(steps[0], path)
        await llm.add_lora("x", path, pinned=True)
        before = (await last(llm, PROMPTS[0], GREEDY, LoRARequest("x"))).outputs[0].text
        weights = (path / "adapter_model.safetensors").read_bytes()
        for damage in (weights[: len(weights) // 2], weights[:100], b""):
            (path / "adapter_model.safetensors").write_bytes(damage)
            with pytest.raises(ValueError, match="adapter_model"):
                await llm.add_lora("x", path)
        (path / "adapter_config.json").unlink()
        with pytest.raises(ValueError, match="no adapter_config"):
            await llm.add_lora("x", path)
        assert (await pins(llm))["x"]
        assert (await last(llm, PROMPTS[0], GREEDY, LoRARequest("x"))).outputs[0].text == before
        await remove(llm, "x")

    run(main())


def test_a_name_that_must_be_new_is_refused_where_it_has_other_content(llm, steps):
    async def main():
        assert not await llm.add_lora("x", steps[0], load_inplace=False)
        assert await llm.add_lora("x", steps[0], load_inplace=False)  # nothing changes
        with pytest.raises(ValueError, match="lora_name is 'x', which has other content; allowed with load_inplace false"):
            await llm.add_lora("x", steps[1], load_inplace=False)
        assert await llm.add_lora("x", steps[0])
        await remove(llm, "x")

    run(main())


def test_loads_of_one_name_take_effect_in_the_order_in_which_they_were_asked_for(llm, steps, monkeypatch):
    gate = threading.Event()
    read = llm.engine.packer.read

    def slow(name, path):
        assert path != steps[0] or gate.wait(TIMEOUT)
        return read(name, path)

    async def main():
        monkeypatch.setattr(llm.engine.packer, "read", slow)
        jobs = [llm.add_lora("x", steps[0]), llm.add_lora("x", steps[1]), llm.pin_lora("x")]
        first, *others = [asyncio.create_task(job) for job in jobs]
        await llm.add_lora("y", steps[2])  # another name does not wait
        assert not any(task.done() for task in (first, *others))
        gate.set()
        assert await asyncio.gather(first, *others) == [False, False, None]
        assert await llm.add_lora("x", steps[1]) and (await pins(llm))["x"]
        gate.clear()
        jobs = [llm.add_lora("x", steps[0]), llm.remove_lora("x"), llm.add_lora("x", steps[3])]
        tasks = [asyncio.create_task(job) for job in jobs]
        await asyncio.sleep(0.01)
        tasks[1].cancel()  # one that gives up lets nobody pass who came later
        await asyncio.sleep(0.01)
        assert not tasks[2].done()
        gate.set()
        await asyncio.gather(tasks[0], tasks[2])
        assert await llm.add_lora("x", steps[3])
        await remove(llm, "x", "y")
        assert len(llm.reader.turns) == 0

    run(main())


def test_many_first_requests_read_their_adapter_once(llm, steps, monkeypatch):
    reads = []
    read = llm.engine.packer.read
    monkeypatch.setattr(llm.engine.packer, "read", lambda *args: (reads.append(args), read(*args))[1])

    async def main():
        ask = LoRARequest("x", str(steps[0]))
        outputs = await asyncio.gather(*(last(llm, PROMPTS[0], GREEDY, ask) for _ in range(12)))
        assert len({output.outputs[0].text for output in outputs}) == 1 and len(reads) == 1
        await remove(llm, "x")

    run(main())


def test_a_request_has_the_content_of_the_path_it_names(llm, steps, monkeypatch):
    read = llm.prompts.read

    async def slow(*args):  # between the adapter's load and the request's start
        await asyncio.sleep(0.05)
        return await read(*args)

    async def main():
        asks = [LoRARequest("x", str(path)) for path in steps[:2]]
        right = [(await last(llm, PROMPTS[0], GREEDY, ask)).outputs[0].text for ask in asks]
        monkeypatch.setattr(llm.prompts, "read", slow)
        outputs = await asyncio.gather(*(last(llm, PROMPTS[0], GREEDY, ask) for ask in asks * 6))
        assert [output.outputs[0].text for output in outputs] == right * 6
        await remove(llm, "x")

    run(main())


def test_an_unload_of_a_pinned_adapter_frees_it_with_its_last_request(llm, steps):
    async def main():
        before = (await llm.stats(max_age=0)).pool
        await llm.add_lora("x", steps[0], pinned=True)
        running = await llm.open(PROMPTS[0], LONG, LoRARequest("x"))
        await anext(running)
        await llm.remove_lora("x")
        async for _ in running:
            pass
        await settled(llm)
        stats = await llm.stats(max_age=0)
        assert stats.pool.adapters <= before.adapters and all(a.names for a in stats.adapters)
        assert llm.engine.loop.cache.pinned_pages() == 0

    run(main())


def contents(root) -> collections.Counter:
    """Sizes of all containers, and bytes of all arrays, that can be reached from an object of this package."""
    sizes: collections.Counter = collections.Counter()
    seen, left = set(), [("llm", root)]
    while left:
        path, thing = left.pop()
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | None.__class__):
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            sizes[path] += thing.nbytes
        elif isinstance(thing, dict):
            sizes[path] += len(thing)
            left += [(f"{path}[]", value) for value in (*thing.keys(), *thing.values())]
        elif isinstance(thing, list | tuple | set | frozenset | collections.deque):
            sizes[path] += len(thing)
            left += [(f"{path}[]", value) for value in list(thing)]
        elif type(thing).__module__.startswith(("chameleon_jax", "concurrent")):
            fields = [*getattr(thing, "__dict__", {}).items()]
            fields += [(name, getattr(thing, name)) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
            left += [(f"{path}.{name}", value) for name, value in fields]
    return sizes


def test_dozens_of_refreshes_leave_nothing_behind(llm, steps):
    """With requests of the old content waiting and running at each of them."""

    async def refresh(times: int):
        streams = collections.deque()
        for i in range(times):
            reference.save_adapter(steps[0], CONFIG, 8, seed=next(seeds))
            await llm.add_lora("x", steps[0])
            streams.append(await llm.open(PROMPTS[0], GREEDY, LoRARequest("x")))
            if i % 3 == 0:
                await anext(streams[-1])
            if len(streams) > 4:
                async for _ in streams.popleft():
                    pass
        for stream in streams:
            async for _ in stream:
                pass
        await settled(llm)

    seeds = itertools.count(1000)

    async def main():
        await llm.add_lora("x", steps[0], pinned=True)
        await refresh(20)
        before, stats = contents(llm), await llm.stats(max_age=0)
        await refresh(60)
        after, now = contents(llm), await llm.stats(max_age=0)
        bounded = "okenizer.token_bytes._inside"  # by the vocabulary
        grown = {path: (before[path], n) for path, n in after.items() if n > before[path] and not path.endswith(bounded)}
        assert grown == {}
        assert (now.pool, now.host_bytes, len(now.adapters)) == (stats.pool, stats.host_bytes, len(stats.adapters))
        await remove(llm, "x")

    asyncio.run(asyncio.wait_for(main(), 5 * TIMEOUT))
