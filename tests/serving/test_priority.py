"""Priorities of requests, from every way to ask down to the scheduler."""

from __future__ import annotations

import openai
import pytest

from chameleon_jax import SamplingParams
from chameleon_jax.serving.client import AsyncClient
from tests.serving.async_calls import last, run

SHORT = SamplingParams(temperature=0, max_tokens=2)
LOWEST, HIGHEST = 2**63 - 1, -(2**63)


def ask_http(client: openai.OpenAI, priority: object) -> None:
    extra = {"priority": priority}
    client.completions.create(model="llama2", prompt="x", max_tokens=2, extra_body=extra)
    client.chat.completions.create(model="llama2", messages=[{"role": "user", "content": "x"}], max_tokens=2, extra_body=extra)


def test_every_protocol_and_client_passes_a_priority_on(served, monkeypatch):
    loop, seen = served.llm.engine.loop, []
    submit = loop.submit
    monkeypatch.setattr(loop, "submit", lambda request: (seen.append(request.priority), submit(request)))

    async def ask_async(target: str) -> None:
        async with AsyncClient(target) as client:
            await client.generate("x", SHORT, priority=3)
            assert [part async for part in client.stream("x", SHORT, priority=4)]

    run(last(served.llm, "x", SHORT, priority=1))
    ask_http(served.openai, HIGHEST)
    ask_http(served.openai, None)
    served.rpc.generate("x", SHORT, priority=LOWEST)
    assert list(served.rpc.stream("x", SHORT, priority=2))
    run(ask_async(served.target))
    run(last(served.llm, "x", SHORT))
    assert seen == [1, HIGHEST, HIGHEST, 0, 0, LOWEST, 2, 3, 4, 0]


@pytest.mark.parametrize("priority", [LOWEST + 1, HIGHEST - 1, 0.5, "high"])
def test_other_priorities_are_refused_by_name(served, priority):
    for call in (
        lambda: run(last(served.llm, "x", SHORT, priority=priority)),
        lambda: served.rpc.generate("x", SHORT, priority=priority),
    ):
        with pytest.raises(ValueError, match=f"priority is '?{priority}'?; allowed: a signed 64-bit integer"):
            call()
    with pytest.raises(openai.BadRequestError, match=f"priority is '?{priority}'?; Input should be") as error:
        ask_http(served.openai, priority)
    assert error.value.param == "priority"


def test_prompts_start_by_their_priorities(make_llm, text_model):
    prompts = ["a", "b", "c", "d"]
    with make_llm(text_model, max_num_seqs=1) as llm:
        outputs = llm.generate(prompts, SHORT, priority=[3, 0, 2, 0])
        starts = {output.prompt: output.metrics.first_scheduled_time for output in outputs}
        assert sorted(prompts, key=lambda prompt: starts[prompt]) == ["b", "d", "c", "a"]
        one = llm.generate(prompts, SHORT, priority=5)
        assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in outputs]
        with pytest.raises(ValueError, match="priority has 1 entries; allowed: one, or one for each of the 4 prompts"):
            llm.generate(prompts, SHORT, priority=[1])
        with pytest.raises(ValueError, match="priority is 9223372036854775808"):
            llm.generate(["a", "b"], SHORT, priority=[0, LOWEST + 1])
        assert not llm.engine.loop.unfinished
