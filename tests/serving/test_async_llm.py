"""AsyncLLM on a small model: the same text as offline, and requests that end early, late, wrongly or not at all."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from chameleon_jax import LoRARequest, SamplingParams
from chameleon_jax.errors import DeadlineExceeded, DuplicateRequest, QueueFull
from chameleon_jax.serving.deadline import Deadline
from tests.serving.async_calls import GREEDY, LONG, PROMPTS, TIMEOUT, Watcher, last, run, settled


def test_many_at_once_say_what_each_says_alone(llm):
    async def main():
        jobs = [(prompt, lora) for prompt in PROMPTS for lora in (None, "a0", "a1", "a3")]
        loras = [None if lora is None else LoRARequest(lora) for _, lora in jobs]
        alone = [await last(llm, prompt, GREEDY, lora) for (prompt, _), lora in zip(jobs, loras)]
        together = await asyncio.gather(*[last(llm, prompt, GREEDY, lora) for (prompt, _), lora in zip(jobs, loras)])
        assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
        assert len({tuple(o.outputs[0].token_ids) for o in alone}) == len(jobs)
        assert all(o.finished and o.outputs[0].finish_reason == "length" for o in together)

    run(main())


def test_outputs_grow_and_deltas_add_up_to_them(llm):
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2)

    async def main():
        outputs = [output async for output in llm.generate(PROMPTS[0], params)]
        for before, after in zip(outputs, outputs[1:]):
            assert after.outputs[0].text.startswith(before.outputs[0].text) and not before.finished
            assert after.outputs[0].token_ids[: len(before.outputs[0].token_ids)] == before.outputs[0].token_ids
            assert len(before.outputs[0].logprobs) == len(before.outputs[0].token_ids)
            assert all(a is b for a, b in zip(before.outputs[0].logprobs, after.outputs[0].logprobs))  # made once
        whole = outputs[-1].outputs[0]
        assert len(outputs) > 1 and outputs[-1].finished and len(whole.token_ids) == len(whole.logprobs) == 24
        async with await llm.open(PROMPTS[0], params) as stream:
            deltas = [delta async for delta in stream]
            assert PROMPTS[0] not in repr(stream)
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
        assert [p for delta in deltas for p in delta.logprobs] == whole.logprobs
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]

    run(main())


def test_no_delta_shows_what_a_stop_string_takes_back(llm):
    async def main():
        text = (await last(llm, PROMPTS[0])).outputs[0].text
        stop = text[8:13]
        cut = text.index(stop)
        deltas = [d async for d in await llm.open(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop=stop))]
        assert "".join(delta.text for delta in deltas) == text[:cut]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)

    run(main())


def test_a_slow_reader_gets_more_at_once(llm):
    async def main():
        async with await llm.open(PROMPTS[0], GREEDY) as stream:
            first = await anext(stream)
            await settled(llm)  # everything else comes while nobody reads
            rest = [delta async for delta in stream]
        assert len(rest) <= 1 + 1 and len(first.token_ids) + sum(len(delta.token_ids) for delta in rest) == 24

    run(main())


@pytest.mark.parametrize("early", ["break", "cancel", "close"])
def test_who_leaves_early_aborts(llm, early):
    async def main():
        before = (await llm.stats(max_age=0)).loop.generation_tokens
        if early == "break":
            generator = llm.generate(PROMPTS[0], LONG)
            async for _ in generator:
                break
            await generator.aclose()
        elif early == "cancel":
            task = asyncio.create_task(last(llm, PROMPTS[0], LONG))
            while (await llm.stats(max_age=0)).loop.generation_tokens == before:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            (await llm.open(PROMPTS[0], LONG)).close()
        await settled(llm)
        assert (await llm.stats(max_age=0)).loop.generation_tokens < before + LONG.max_tokens

    run(main())


def test_cancelled_while_it_is_taken_in(llm):
    async def main():
        gate = threading.Event()
        blocked = asyncio.ensure_future(llm.call(lambda engine: gate.wait(TIMEOUT)))
        tasks = [asyncio.create_task(llm.open(PROMPTS[0], LONG)) for _ in range(8)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        gate.set()
        await blocked
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        await settled(llm)

    run(main())


def test_observers_are_told_once(llm, caplog):
    watcher = Watcher()

    async def main():
        await asyncio.gather(*[last(llm, PROMPTS[0], lora=LoRARequest("a2"), request_id=f"r{i}") for i in range(6)])
        (await llm.open(PROMPTS[0], LONG, request_id="gone")).close()
        await settled(llm)

    llm.observers.append(watcher)
    run(main())
    llm.observers.remove(watcher)
    names = [f"r{i}" for i in range(6)]
    # the one that was given up may have had its first token before it was taken back
    assert sorted(watcher.first_tokens) in (names, ["gone", *names])
    assert sorted(watcher.ends) == ["gone", *names] and not watcher.lost_requests
    errors = {str(record.exc_info[1]) for record in caplog.records if record.exc_info}
    assert errors <= {"what an observer raises concerns nobody"}  # of a load, if there was one


def test_all_get_in_or_none(own_llm):
    llm = own_llm(max_queue_len=3, max_num_seqs=2)

    async def main():
        params = [SamplingParams(seed=seed, max_tokens=8) for seed in (1, 2, 1)]
        streams = await llm.open_all(PROMPTS[:1], params, request_id="x")
        assert [stream.request_id for stream in streams] == ["x-0", "x-1", "x-2"]
        tokens = [[t async for delta in stream for t in delta.token_ids] for stream in streams]
        assert tokens[0] == tokens[2] != tokens[1]
        with pytest.raises(QueueFull):
            await llm.open_all(PROMPTS, [LONG, LONG])
        assert not llm._streams
        with pytest.raises(ValueError, match="token id 256"):
            await llm.open_all([PROMPTS[0], [256]], [LONG])
        assert (await llm.stats(max_age=0)).waiting == 0 and not llm._streams
        streams = await llm.open_all(PROMPTS[:2], [GREEDY], deadline=Deadline(TIMEOUT))
        texts = ["".join([delta.text async for delta in stream]) for stream in streams]
        assert texts == [(await last(llm, prompt)).outputs[0].text for prompt in PROMPTS[:2]]

    run(main())


def test_what_came_before_an_error_is_read(llm):
    async def main():
        stream = await llm.open(PROMPTS[0], LONG)
        while not stream.has_begun:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # it is delivered
        stream.abort(DeadlineExceeded("over"))
        assert (await anext(stream)).token_ids
        with pytest.raises(DeadlineExceeded, match="over"):
            await anext(stream)

    run(main())


def test_abort_by_id(llm):
    async def main():
        stream = await llm.open(PROMPTS[0], LONG, request_id="mine")
        with pytest.raises(DuplicateRequest, match="mine"):
            await llm.open(PROMPTS[0], LONG, request_id="mine")
        await anext(stream)
        assert await llm.abort("mine") and not await llm.abort("mine")
        assert [delta async for delta in stream][-1].finish_reason == "abort"
        assert not await llm.abort("nobody")

    run(main())


def test_an_id_that_was_given_up_may_be_used_again_at_once(llm):
    async def main():
        expected = (await last(llm, PROMPTS[0])).outputs[0].text
        (await llm.open(PROMPTS[0], LONG, request_id="mine")).close()
        output = await last(llm, PROMPTS[0], request_id="mine")
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == (expected, "length")

    run(main())


def test_deadline(llm):
    async def main():
        stream = await llm.open(PROMPTS[0], LONG, timeout=30)
        stream.abort(DeadlineExceeded("the request took longer than 0 s"))
        with pytest.raises(DeadlineExceeded, match="took longer"):
            async for _ in stream:
                pass
        await settled(llm)
        gate = threading.Event()
        blocked = asyncio.ensure_future(llm.call(lambda engine: gate.wait(TIMEOUT)))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded, match="longer than 0.02 s"):  # while it waits to be taken in
            await llm.open(PROMPTS[0], LONG, timeout=0.02)
        gate.set()
        await blocked
        await settled(llm)
        with pytest.raises(DeadlineExceeded, match="longer than 1e-06 s"):
            await last(llm, PROMPTS[0], LONG, timeout=1e-6)
        with pytest.raises(ValueError, match="timeout is 0"):
            await last(llm, PROMPTS[0], LONG, timeout=0)
        with pytest.raises(ValueError, match="timeout is nan"):
            await last(llm, PROMPTS[0], LONG, timeout=float("nan"))
        assert (await last(llm, PROMPTS[0], timeout=TIMEOUT)).finished

    run(main())


def test_the_wall_clock_may_jump(llm, monkeypatch):
    async def main():
        expected = (await last(llm, PROMPTS[0])).outputs[0].text
        now, calls = time.time, [0]

        def jumping():
            calls[0] += 1
            return now() + (-1) ** calls[0] * 86_400

        monkeypatch.setattr(time, "time", jumping)
        assert (await last(llm, PROMPTS[0], timeout=TIMEOUT)).outputs[0].text == expected

    run(main())


@pytest.mark.parametrize(
    ("prompt", "params", "lora", "error", "match"),
    [
        ([], GREEDY, None, ValueError, "prompt is empty"),
        ([256], GREEDY, None, ValueError, "token id 256"),
        ([-1], GREEDY, None, ValueError, "token id -1"),
        (["x"], GREEDY, None, ValueError, "token id 'x'"),
        ("x" * 5000, GREEDY, None, ValueError, "max_model_len"),
        ([0] * 1_000_000, GREEDY, None, ValueError, "1000000 tokens"),
        ({"prompt_token_ids": ["x"] * 1_000_000}, GREEDY, None, ValueError, "1000000 tokens"),
        ({"text": "x"}, GREEDY, None, ValueError, "keys"),
        ({"prompt": "x", "prompt_token_ids": [1]}, GREEDY, None, ValueError, "keys"),
        ("x", SamplingParams(max_tokens=1000), None, ValueError, "max_model_len"),
        ("x", GREEDY, LoRARequest("nobody"), KeyError, "nobody"),
        ("x", GREEDY, LoRARequest("nobody", "/nowhere"), ValueError, "nowhere"),
    ],
)
def test_wrong_requests_say_why(llm, prompt, params, lora, error, match):
    with pytest.raises(error, match=match):
        run(last(llm, prompt, params, lora))


def test_the_queue_has_an_end(own_llm):
    llm = own_llm(max_queue_len=3, max_num_seqs=2)

    async def main():
        streams = [await llm.open(PROMPTS[0], LONG) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        streams += [await llm.open(PROMPTS[0], GREEDY) for _ in range(3)]
        with pytest.raises(QueueFull, match="max_queue_len"):
            await llm.open(PROMPTS[0], GREEDY)
        for stream in streams:
            assert [delta async for delta in stream][-1].finish_reason == "length"

    run(main())


def test_from_several_asyncio_loops(llm):
    texts: list[str] = []

    def client():
        texts.append(asyncio.run(last(llm, PROMPTS[1])).outputs[0].text)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(texts) == 4 and len(set(texts)) == 1
