from __future__ import annotations

import asyncio
import threading

import pytest

from chameleon_jax.serving.turns import Turns


def test_one_at_a_time_in_the_order_of_arrival():
    async def main():
        turns, order = Turns(), []

        async def caller(name: str, number: int):
            async with turns.of(name):
                order.append((name, number))
                await asyncio.sleep(0.001)
                order.append((name, number))

        await asyncio.gather(*(caller(name, i) for i in range(5) for name in "ab"))
        for name in "ab":
            assert [n for key, n in order if key == name] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert len(turns) == 0

    asyncio.run(main())


def test_one_that_fails_or_gives_up_lets_the_next_in_when_its_turn_would_have_come():
    async def main():
        turns, gate, order = Turns(), asyncio.Event(), []

        async def first():
            async with turns.of("a"):
                await gate.wait()
                order.append("first")
                raise ValueError("mine")

        async def other(number: int):
            async with turns.of("a"):
                order.append(number)

        tasks = [asyncio.create_task(first()), *(asyncio.create_task(other(i)) for i in range(3))]
        await asyncio.sleep(0)
        tasks[3].cancel()
        tasks[1].cancel()
        await asyncio.sleep(0.001)
        late = asyncio.create_task(other(9))
        await asyncio.sleep(0.001)
        assert order == [] and len(turns) == 1
        gate.set()
        with pytest.raises(ValueError, match="mine"):
            await tasks[0]
        await asyncio.gather(tasks[2], late)
        assert order == ["first", 1, 9] and len(turns) == 0

    asyncio.run(main())


def test_callers_of_several_loops():
    turns, inside, most = Turns(), [], []

    async def caller():
        async with turns.of("a"):
            inside.append(None)
            most.append(len(inside))
            await asyncio.sleep(0.001)
            inside.pop()

    async def main():
        await asyncio.gather(*(caller() for _ in range(10)))

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 30 and len(turns) == 0
