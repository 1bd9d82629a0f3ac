"""Several adapters in one request: the sum of their updates, each times its weight."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from chameleon_jax import LLM, LoRAMix, LoRARequest, SamplingParams
from chameleon_jax.checkpoints import huggingface, peft
from chameleon_jax.memory import adapter_registry
from tests import reference_models as reference
from tests.serving.async_calls import GREEDY, LONG, PROMPTS, TIMEOUT, last, run, settled
from tests.serving.conftest import CONFIG

MIX = LoRAMix([LoRARequest("a1"), LoRARequest("a2"), LoRARequest("a0")], [0.6, -0.4, 1.5])
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)


def merge(members, directory):
    """Save the reference model with the dense updates of adapters added to its matrices."""
    checkpoint = reference.checkpoint(CONFIG)
    for path, weight in members:
        for (layer, target), (a, b) in peft.load(path, CONFIG).tensors.items():
            parent = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            checkpoint.tensors[f"model.layers.{layer}.{parent}.{target}.weight"] += weight * (b @ a)
    huggingface.save(checkpoint, directory)
    return directory


def with_paths(adapter_dir) -> LoRAMix:
    loras = [dataclasses.replace(lora, path=str(adapter_dir / lora.name)) for lora in MIX.loras]
    return dataclasses.replace(MIX, loras=loras)


def test_a_mix_is_the_model_with_the_sum_of_the_dense_updates(make_llm, text_model, adapter_dir, tmp_path):
    mix = with_paths(adapter_dir)
    prompts = [reference.prompt(seed, 12) for seed in range(3)]
    with make_llm(text_model) as llm:
        mixed = llm.generate(prompts, PARAMS, mix)
        base = llm.generate(prompts, PARAMS)
        assert mixed[0].lora_request is mix and mix.name == "0.6*a1+-0.4*a2+1.5*a0"
    members = [(lora.path, weight) for lora, weight in mix.members]
    with LLM(str(merge(members, tmp_path / "merged")), max_num_seqs=4, max_model_len=64, compile_programs="lazy") as merged:
        expected = merged.generate(prompts, PARAMS)
    assert [o.outputs[0].token_ids for o in mixed] == [o.outputs[0].token_ids for o in expected]
    assert [o.outputs[0].token_ids for o in mixed] != [o.outputs[0].token_ids for o in base]
    for found, right in zip(mixed, expected):
        for a, b in zip(found.outputs[0].logprobs, right.outputs[0].logprobs):
            np.testing.assert_allclose([a[t].logprob for t in b], [b[t].logprob for t in b], atol=2e-3)


def test_one_adapter_of_weight_1_is_that_adapter(llm):
    async def main():
        alone = await llm.open(PROMPTS[0], GREEDY, LoRARequest("a1"))
        mixed = await llm.open(PROMPTS[0], GREEDY, LoRAMix([LoRARequest("a1")]))
        assert mixed.request.adapter == alone.request.adapter
        for stream in (alone, mixed):
            stream.close()

    run(main())


def test_requests_of_a_mix_pack_it_once_in_any_order(llm, monkeypatch):
    jobs = []
    mix = llm.engine.packer.mix
    monkeypatch.setattr(llm.engine.packer, "mix", lambda job: (jobs.append(job), mix(job))[1])
    other = LoRAMix(MIX.loras[::-1], MIX.weights[::-1])

    async def main():
        outputs = await asyncio.gather(*(last(llm, PROMPTS[0], GREEDY, MIX) for _ in range(8)))
        outputs.append(await last(llm, PROMPTS[0], GREEDY, other))
        assert len({output.outputs[0].text for output in outputs}) == 1 and len(jobs) == 1
        adapters = {adapter.names: adapter for adapter in (await llm.stats(max_age=0)).adapters}
        assert adapters[(MIX.name,)].rank == 2 + 8 + 16
        assert MIX.name not in await llm.list_loras()

    run(main())


def test_a_mix_has_the_contents_that_its_names_had_when_the_request_came(llm, adapter_dir):
    async def main():
        mix = LoRAMix([LoRARequest("x"), LoRARequest("a0")], [0.5, 0.5])
        await llm.add_lora("x", adapter_dir / "a1")
        old = (await last(llm, PROMPTS[0], LONG, mix)).outputs[0].text
        running = await llm.open(PROMPTS[0], LONG, mix)
        await anext(running)
        await llm.add_lora("x", adapter_dir / "a3")
        new = (await last(llm, PROMPTS[0], LONG, mix)).outputs[0].text
        async for _ in running:
            pass
        assert running.output().outputs[0].text == old != new
        await llm.remove_lora("x")
        with pytest.raises(KeyError, match="no adapter is named 'x'"):
            await llm.open(PROMPTS[0], LONG, mix)

    run(main())


def test_a_mix_is_forgotten_with_the_last_name_of_a_member(llm, tmp_path):
    async def main():
        await settled(llm)
        before = await llm.stats(max_age=0)
        await llm.add_lora("x", reference.save_adapter(tmp_path, CONFIG, 4, seed=50))
        mix = LoRAMix([LoRARequest("x"), LoRARequest("a0")])
        running = await llm.open(PROMPTS[0], LONG, mix)
        await anext(running)
        await llm.remove_lora("x")
        async for _ in running:
            pass
        await settled(llm)
        after = await llm.stats(max_age=0)
        assert len(after.adapters) == len(before.adapters) and after.host_bytes == before.host_bytes

    run(main())


class Held:
    """Packing of mixes, which waits for a gate."""

    def __init__(self, pack):
        self.gate = threading.Event()
        self._pack, self._begun = pack, threading.Event()

    def __call__(self, job):
        self._begun.set()
        assert self.gate.wait(TIMEOUT)
        return self._pack(job)

    async def packing(self) -> None:
        """Wait until a mix is at the gate."""
        while not self._begun.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def held(llm, monkeypatch):
    held = Held(llm.engine.packer.mix)
    monkeypatch.setattr(llm.engine.packer, "mix", held)
    return held


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_mix_whose_member_goes_while_it_is_packed_leaves_nothing(llm, held, tmp_path, change):
    async def main():
        await settled(llm)
        before = await llm.stats(max_age=0)
        await llm.add_lora("x", reference.save_adapter(tmp_path / "old", CONFIG, 4, seed=51))
        asked = asyncio.create_task(last(llm, PROMPTS[0], GREEDY, LoRAMix([LoRARequest("x"), LoRARequest("a0")])))
        await held.packing()
        if change == "removed":
            await llm.remove_lora("x")
        else:
            await llm.add_lora("x", reference.save_adapter(tmp_path / "new", CONFIG, 4, seed=52))
        held.gate.set()
        if change == "removed":
            with pytest.raises(KeyError, match="no adapter is named 'x'"):
                await asked
        else:
            assert (await asked).finished  # with the new content
            await llm.remove_lora("x")
        await settled(llm)
        after = await llm.stats(max_age=0)
        assert len(after.adapters) == len(before.adapters) and after.host_bytes == before.host_bytes

    run(main())


def test_the_least_recently_used_mixes_are_forgotten(llm, monkeypatch):
    monkeypatch.setattr(adapter_registry, "MAX_MIXES", 2)

    def mix(weight):
        return LoRAMix([LoRARequest("a0"), LoRARequest("a1")], [weight, 1.0])

    async def main():
        for weight in (0.1, 0.2, 0.1, 0.3):
            await last(llm, PROMPTS[0], GREEDY, mix(weight))
        await settled(llm)
        names = {name for adapter in (await llm.stats(max_age=0)).adapters for name in adapter.names}
        assert {name for name in names if "*" in name} == {mix(0.1).name, mix(0.3).name}

    run(main())


def test_steps_go_on_while_a_mix_is_packed(llm, held):
    async def main():
        ask = LoRAMix(MIX.loras, [0.11, 0.12, 0.13])
        mixed = asyncio.create_task(last(llm, PROMPTS[0], GREEDY, ask))
        await held.packing()
        assert (await last(llm, PROMPTS[0], LONG, LoRARequest("a1"))).finished and not mixed.done()
        held.gate.set()
        assert (await mixed).finished

    run(main())


def test_members_that_wait_on_disk(make_llm, text_model, adapter_dir):
    mix = with_paths(adapter_dir)
    with make_llm(text_model) as llm:
        expected = llm.generate([reference.prompt(1)], GREEDY, mix)
    with make_llm(text_model, lora_host_bytes=0) as llm:
        assert llm.generate([reference.prompt(1)], GREEDY, mix)[0].outputs == expected[0].outputs


def test_a_restart_forgets_mixes(make_llm, text_model, adapter_dir):
    with make_llm(text_model) as llm:
        llm.generate([reference.prompt(1)], GREEDY, with_paths(adapter_dir))
        assert len(llm.engine.adapters.names_by_hash()) == 4
        llm.engine.restart()
        assert llm.list_loras() == ["a0", "a1", "a2"] and len(llm.engine.adapters.names_by_hash()) == 3
        for name in llm.list_loras():
            llm.remove_lora(name)
        assert llm.engine.store.bytes_in_memory == 0


def test_a_mix_of_too_large_a_rank_is_refused_by_name(make_llm, text_model, adapter_dir):
    mix = LoRAMix([LoRARequest(name, str(adapter_dir / name)) for name in ("a1", "a2")])
    with make_llm(text_model, max_lora_rank=20) as llm:
        with pytest.raises(ValueError, match=r"adapter '1\*a1\+1\*a2': rank is 24; allowed: 1 to 20 \(max_lora_rank"):
            llm.generate([reference.prompt(1)], GREEDY, mix)
        assert llm.list_loras() == ["a1", "a2"] and not llm.engine.loop.has_unfinished


def test_weights_that_overflow_are_refused(llm):
    with pytest.raises(ValueError, match="NaN or infinity"):
        run(llm.open(PROMPTS[0], GREEDY, LoRAMix([LoRARequest("a0"), LoRARequest("a1")], [1e300, 1.0])))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], (), "loras is .*; allowed: 1 to 8 adapters"),
        ("abcdefghi", (), "allowed: 1 to 8 adapters"),
        ("aa", (), r"loras is \['a', 'a'\]; allowed: each name once"),
        ("ab", (1.0,), "weights is .*; allowed: a finite number for each adapter"),
        ("a", (float("nan"),), "weights is"),
        ("a", ("1",), "weights is"),
    ],
)
def test_wrong_mixes_say_why(names, weights, message):
    with pytest.raises(ValueError, match=message):
        LoRAMix([LoRARequest(name) for name in names], weights)
