"""Adapters from a trainer's memory while requests run."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import LoRARequest
from chameleon_jax.checkpoints.finetune import FinetuneConfig, init_adapter
from tests import reference_models as reference
from tests.serving.async_calls import GREEDY, LONG, PROMPTS, last, run, settled
from tests.serving.conftest import CONFIG

SETTINGS = {"lora_alpha": 16.0}


def policy(seed: int, rank: int = 8):
    """Weights as a trainer has them: one mapping a layer, arrays of JAX."""
    tree = init_adapter(CONFIG, FinetuneConfig(rank=rank, seed=seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda m: m if m.any() else jnp.asarray(rng.standard_normal(m.shape, np.float32) * 0.1), tree)


def save(directory, weights):
    from chameleon_jax.checkpoints import finetune

    finetune.save(weights, directory, FinetuneConfig(rank=8), "base", "float32")
    return directory


async def text_of(llm, name="x", params=GREEDY):
    return (await last(llm, PROMPTS[0], params, LoRARequest(name))).outputs[0].text


def test_weights_from_memory_are_the_content_that_their_file_would_be(llm, tmp_path):
    async def main():
        assert not await llm.add_lora("x", weights=policy(1), peft_config=SETTINGS)
        assert await llm.add_lora("x", save(tmp_path, policy(1)))  # already there
        assert await llm.add_lora("x", weights=policy(1), peft_config=SETTINGS)
        assert await text_of(llm) != (await last(llm, PROMPTS[0])).outputs[0].text
        await llm.remove_lora("x")

    run(main())


def test_a_running_request_ends_on_the_old_weights_and_the_pin_follows_the_name(llm):
    async def main():
        before = len((await llm.stats(max_age=0)).adapters)
        await llm.add_lora("x", weights=policy(1), peft_config=SETTINGS, pinned=True)
        old = await text_of(llm, params=LONG)
        running = await llm.open(PROMPTS[0], LONG, LoRARequest("x"))
        await anext(running)
        await llm.add_lora("x", weights=policy(2), peft_config=SETTINGS)
        new = await text_of(llm, params=LONG)
        async for _ in running:
            pass
        assert running.output().outputs[0].text == old != new
        await settled(llm)
        stats = await llm.stats(max_age=0)
        assert [adapter.pinned for adapter in stats.adapters if "x" in adapter.names] == [True]
        assert len(stats.adapters) == before + 1  # nothing is kept of the old weights
        await llm.remove_lora("x")

    run(main())


def test_each_of_many_requests_has_the_weights_of_one_step(llm):
    """Requests arrive while a trainer publishes: all choices of a request have one content, and it is one that was there."""

    async def main():
        before = len((await llm.stats(max_age=0)).adapters)
        right = []
        for seed in range(4):
            await llm.add_lora("x", weights=policy(seed), peft_config=SETTINGS)
            right.append(await text_of(llm))
        assert len(set(right)) == 4

        async def publish():
            for seed in range(4):
                await llm.add_lora("x", weights=policy(seed), peft_config=SETTINGS)
                assert await text_of(llm) == right[seed]  # a request that starts now has the new weights

        async def ask():
            found = []
            for _ in range(6):
                streams = await llm.open_all(PROMPTS[:1], [GREEDY] * 2, LoRARequest("x"))
                assert streams[0].request.adapter == streams[1].request.adapter
                for stream in streams:
                    async for _ in stream:
                        pass
                    found.append(stream.output().outputs[0].text)
            return found

        _, *asked = await asyncio.gather(publish(), *(ask() for _ in range(4)))
        assert {text for found in asked for text in found} <= set(right)
        await settled(llm)
        assert len((await llm.stats(max_age=0)).adapters) == before + 1
        await llm.remove_lora("x")

    run(main())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'x': path and weights: neither given; allowed: one of them"),
        ({"path": "a", "weights": policy(1)}, "path and weights: both given"),
        ({"weights": policy(1)}, "lora_alpha at least"),
        ({"weights": policy(1, rank=257), "peft_config": SETTINGS}, r"'x': rank is 257; allowed: 1 to 256 \(max_lora_rank"),
        ({"weights": jax.tree.map(lambda m: m.at[0, 0].set(jnp.nan), policy(1)), "peft_config": SETTINGS}, "NaN or infinity"),
        ({"weights": jax.tree.map(lambda m: m[:, :-1], policy(1)), "peft_config": SETTINGS}, "A is|says rank"),
    ],
)
def test_weights_that_cannot_be_served_leave_the_old_content(llm, given, message):
    async def main():
        await llm.add_lora("x", weights=policy(3), peft_config=SETTINGS)
        before = llm.engine.adapters.get("x")
        with pytest.raises(ValueError, match=message):
            await llm.add_lora("x", **given)
        assert llm.engine.adapters.get("x") is before
        await llm.remove_lora("x")

    run(main())


def test_llm_takes_weights_too(make_llm, text_model, tmp_path):
    with make_llm(text_model) as llm:
        llm.add_lora("x", weights=policy(1), peft_config=SETTINGS, pinned=True)
        llm.add_lora("y", save(tmp_path, policy(1)))
        x, y = llm.generate([reference.prompt(1)] * 2, GREEDY, [LoRARequest("x"), LoRARequest("y")])
        assert x.outputs == y.outputs
        assert llm.engine.adapters.get("x") == llm.engine.adapters.get("y")
