"""The whole engine on small models, in float32: what must not change a request's text does not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.models.config import PRESETS
from tests import reference_models as reference

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CONFIG = reference.CONFIGS["gqa"]


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def model(text_model):
    return text_model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(f"a{i}", str(reference.save_adapter(folder / f"a{i}", CONFIG, rank, seed=i)))
        for i, rank in enumerate((2, 8, 16, 40, 8, 8))
    ]


@pytest.fixture(scope="module")
def llm(engines, model):
    with engines.borrow(model) as engine, LLM(engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm, adapters):
    """What each of 32 requests gives by itself."""
    return [tokens(llm.generate([p], GREEDY, lora_request=a))[0] for p, a in zip(*workload(adapters))]


def workload(adapters):
    prompts = [reference.prompt(seed, length=5 + 3 * seed % 60) for seed in range(32)]
    return prompts, [None if i % 7 == 6 else adapters[i % 7 % len(adapters)] for i in range(32)]


def test_in_a_batch_of_others(llm, adapters, alone):
    prompts, loras = workload(adapters)
    assert tokens(llm.generate(prompts, GREEDY, lora_request=loras)) == alone


def test_batch_of_32_and_chunked(make_llm, model, adapters, alone):
    prompts, loras = workload(adapters)
    with make_llm(model, max_num_seqs=32, max_num_batched_tokens=32) as llm:
        assert tokens(llm.generate(prompts, GREEDY, lora_request=loras)) == alone


def test_adapters_evicted_and_reloaded(make_llm, model, adapters, alone):
    prompts, loras = workload(adapters)
    with make_llm(model, num_pages=64) as llm:
        outputs = llm.generate(prompts, GREEDY, lora_request=loras)
        counters, loop = llm.engine.loop.cache.counters, llm.engine.loop
        assert counters.evictions > 0 and counters.loads > len(adapters)
        assert counters.bytes_sent == counters.bytes_loaded > 0 and counters.load_seconds > 0
        usage = loop.pool.usage()
        assert usage.kv == 0 and usage.free + usage.adapters == usage.total
    assert tokens(outputs) == alone


def test_preempted_and_recomputed(make_llm, model, adapters, alone):
    prompts, loras = workload(adapters)
    picks = [i for i, lora in enumerate(loras) if lora in (None, adapters[0])] * 3
    # one small adapter and far more requests than pages, each admitted for one token of the 24 it will have
    with make_llm(model, num_pages=40, max_num_seqs=16, max_lora_rank=2, predicted_output_len=1) as llm:
        outputs = llm.generate([prompts[i] for i in picks], GREEDY, lora_request=[loras[i] for i in picks])
        assert llm.engine.loop.scheduler.counters.preemptions > 0
        assert max(o.metrics.num_preemptions for o in outputs) > 0
    assert tokens(outputs) == [alone[i] for i in picks]


def test_adapters_that_wait_on_disk(make_llm, model, adapters, alone):
    prompts, loras = workload(adapters)
    with make_llm(model, num_pages=64, lora_host_bytes=0) as llm:
        assert tokens(llm.generate(prompts, GREEDY, lora_request=loras)) == alone


def test_the_same_seed_gives_the_same_text_however_it_is_batched(llm, adapters):
    drawn = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=i, max_tokens=20)
        for i, (t, k, p) in enumerate([(1.0, 0, 1.0), (1.0, 9, 0.9), (1e-9, 0, 1.0), (100.0, 2**31 - 1, 1e-300)])
    ]
    prompts = [reference.prompt(seed) for seed in (5, 6, 7, 8)]
    alone = [tokens(llm.generate([p], s, lora_request=adapters[0]))[0] for p, s in zip(prompts, drawn)]
    filler = [reference.prompt(i) for i in range(5)]
    mixed = llm.generate([*filler, *prompts], [GREEDY] * 5 + drawn, lora_request=[adapters[1]] * 5 + [adapters[0]] * 4)
    assert tokens(mixed)[5:] == alone
    assert alone[2:] == tokens(
        llm.generate(prompts[2:], dataclasses.replace(GREEDY, max_tokens=20), lora_request=[adapters[0]] * 2)
    )
    other_seed = dataclasses.replace(drawn[0], seed=77)
    assert tokens(llm.generate([prompts[0]], other_seed, lora_request=adapters[0]))[0] != alone[0]


def test_a_running_request_keeps_the_weights_it_started_with(make_llm, model, adapters, tmp_path):
    with make_llm(model) as llm:
        engine = llm.engine
        llm.add_lora("name", adapters[0].path)
        [expected] = tokens(llm.generate([reference.prompt(1)], GREEDY, lora_request=LoRARequest("name")))
        request = engine.submit(reference.prompt(1), GREEDY, LoRARequest("name"))
        for _ in range(5):
            engine.loop.step()
        old = request.adapter
        llm.add_lora("name", adapters[1].path)
        second = engine.submit(reference.prompt(1), GREEDY, LoRARequest("name"))
        while engine.loop.has_unfinished:
            engine.loop.step()
        assert request.output_token_ids == expected
        assert second.output_token_ids != expected
        assert old not in engine.loop.cache and old not in engine.store  # nothing holds the old weights any more


def test_another_path_under_a_name_replaces_the_adapter(make_llm, model, adapters):
    with make_llm(model) as llm:
        paths = [adapters[0].path, adapters[1].path, adapters[1].path]
        first, second, again = (
            tokens(llm.generate([reference.prompt(1)], GREEDY, lora_request=LoRARequest("x", path))) for path in paths
        )
        assert first != second and second == again


def test_removed_memory_comes_back(make_llm, model, adapters):
    with make_llm(model) as llm:
        loop = llm.engine.loop
        free = loop.pool.num_free
        llm.generate([reference.prompt(1)] * 2, GREEDY, lora_request=adapters[:2])
        assert loop.pool.num_free < free
        for name in llm.list_loras():
            llm.remove_lora(name)
        assert loop.pool.num_free == free
        assert llm.engine.store.bytes_in_memory == 0
        with pytest.raises(KeyError, match="no adapter is named 'a0'"):
            llm.generate([reference.prompt(1)], GREEDY, lora_request=LoRARequest("a0"))


def test_a_pinned_adapter_stays(make_llm, model, adapters):
    with make_llm(model, num_pages=64) as llm:
        llm.generate([reference.prompt(1)], GREEDY, lora_request=adapters[0])
        llm.pin_lora("a0")
        pinned = llm.engine.adapters.get("a0").content_hash
        for adapter in adapters[1:]:
            llm.generate([reference.prompt(1, 60)] * 4, GREEDY, lora_request=adapter)
        assert llm.engine.loop.cache.entry(pinned).tier is AdapterTier.RESIDENT
        assert llm.engine.loop.cache.entry(pinned).loads == 1


def test_what_can_never_run_is_refused_at_once(llm, adapters, tmp_path):
    for prompt, params, message in (
        (reference.prompt(1, 120), GREEDY, r"120 \+ 24 tokens; allowed: 128"),
        ([], GREEDY, "prompt is empty"),
        ([999], GREEDY, "token id 999"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([{"prompt_token_ids": prompt}], params)
    with pytest.raises(ValueError, match="no adapter_config.json"):
        llm.generate([reference.prompt(1)], GREEDY, lora_request=LoRARequest("broken", str(tmp_path)))
    with pytest.raises(ValueError, match="unknown setting 'max_loras'"):
        LLM("tiny", max_loras=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="lora_request is False; allowed: LoRARequest, LoRAMix or None"):
        llm.generate([[1], [2]], GREEDY, False)
    with pytest.raises(ValueError, match="lora_request has 1 entries"):
        llm.generate([[1], [2]], GREEDY, lora_request=[adapters[0]])
    assert not llm.engine.loop.has_unfinished


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="token id"):
        llm.generate([[1, 2], [3, -4]], GREEDY)
    with pytest.raises(ValueError, match="token id 2.0"):
        llm.generate([[1, 2.0]], GREEDY)
    while llm.engine.loop.has_unfinished:
        llm.engine.loop.step()
    assert llm.engine.loop.pool.usage().kv == 0


def test_stops_and_lengths(llm):
    [reference_output] = llm.generate([reference.prompt(9)], GREEDY)
    ids = reference_output.outputs[0].token_ids
    assert reference_output.outputs[0].finish_reason == "length"
    stop = ids[5]
    first = ids.index(stop)
    [output] = llm.generate([reference.prompt(9)], dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    assert output.outputs[0].token_ids == ids[: first + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    [output] = llm.generate([reference.prompt(9)], dataclasses.replace(GREEDY, stop_token_ids=[stop], min_tokens=20))
    assert stop not in output.outputs[0].token_ids[:20]


def test_logprobs(llm):
    [output] = llm.generate([reference.prompt(9)], dataclasses.replace(GREEDY, logprobs=4))
    for token, position in zip(output.outputs[0].token_ids, output.outputs[0].logprobs):
        values = [entry.logprob for entry in position.values()]
        assert len(position) == 4 and values == sorted(values, reverse=True)
        assert next(iter(position)) == token and values[0] == max(values) and all(v <= 0 for v in values)
    [none] = llm.generate([reference.prompt(9)], GREEDY)
    assert none.outputs[0].logprobs is None and none.outputs[0].token_ids == output.outputs[0].token_ids
    assert none.prompt_logprobs is None


def scored(llm, adapters, **fields) -> None:
    """Compare the log-probabilities of prompts that hold earlier outputs with those that the outputs had."""
    prompts, loras = workload(adapters)
    prompts, loras = prompts[::4], loras[::4]
    outputs = llm.generate(prompts, dataclasses.replace(GREEDY, logprobs=3), lora_request=loras)
    longer = [prompt + output.outputs[0].token_ids for prompt, output in zip(prompts, outputs)]
    params = dataclasses.replace(GREEDY, max_tokens=6, prompt_logprobs=3)
    for prompt, output, again in zip(prompts, outputs, llm.generate(longer, params, lora_request=loras)):
        found = again.prompt_logprobs
        assert len(found) == len(prompt) + 24 and found[0] is None
        for token_id, position in zip([*prompt, *output.outputs[0].token_ids][1:], found[1:]):
            assert next(iter(position)) == token_id and 3 <= len(position) <= 4
        for now, then in zip(found[len(prompt) :], output.outputs[0].logprobs):
            assert now.keys() == then.keys()
            assert [p.decoded_token for p in now.values()] == [p.decoded_token for p in then.values()]
            assert [p.logprob for p in now.values()] == pytest.approx([p.logprob for p in then.values()], abs=1e-4)


def test_prompt_logprobs_are_those_that_the_tokens_had_as_output(llm, adapters):
    scored(llm, adapters)


def test_prompt_logprobs_of_prompts_in_chunks(make_llm, model, adapters):
    with make_llm(model, max_num_seqs=8, max_num_batched_tokens=32) as llm:
        scored(llm, adapters)


def test_prompt_logprobs_of_preempted_requests(make_llm, model, adapters):
    prompts = [reference.prompt(seed, 30) for seed in range(12)]
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    with make_llm(model) as llm:
        expected = [output.prompt_logprobs for output in llm.generate(prompts, params)]
    with make_llm(model, num_pages=40, max_num_seqs=16, max_lora_rank=2, predicted_output_len=1) as llm:
        outputs = llm.generate(prompts, params)
        assert max(output.metrics.num_preemptions for output in outputs) > 0
    for output, right in zip(outputs, expected):
        for now, then in zip(output.prompt_logprobs[1:], right[1:]):
            assert {t: p.logprob for t, p in now.items()} == pytest.approx({t: p.logprob for t, p in then.items()}, abs=1e-4)


def test_a_prompt_of_one_token_has_no_log_probabilities(llm):
    [output] = llm.generate([[65]], dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=2))
    assert output.prompt_logprobs == [None]


def test_dummy_weights_of_a_quantised_model_are_refused(tmp_path):
    hf = reference.CONFIGS["gqa"].to_hf() | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="quantization_config .*awq"):
        LLM(str(tmp_path), load_format="dummy")


def test_dummy_weights(make_llm, tmp_path):
    with make_llm("tiny", load_format="dummy", num_pages=50, enable_lora=False) as llm:
        [output] = llm.generate([[1, 2, 3]], GREEDY)
        assert len(output.outputs[0].token_ids) == 24
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(ValueError, match="enable_lora is False"):
            llm.add_lora("x", reference.save_adapter(tmp_path, PRESETS["tiny"], 2))


def test_a_request_that_loads_in_place_reads_its_path_once_a_call(make_llm, model, tmp_path, monkeypatch):
    path = reference.save_adapter(tmp_path / "policy", CONFIG, 8, seed=1)
    with make_llm(model) as llm:
        reads = []
        read = llm.engine.packer.read
        monkeypatch.setattr(llm.engine.packer, "read", lambda *args: (reads.append(args), read(*args))[1])
        ask = LoRARequest("x", str(path), load_inplace=True)
        prompts = [reference.prompt(1)] * 3
        first = tokens(llm.generate(prompts, GREEDY, lora_request=ask))
        reference.save_adapter(path, CONFIG, 8, seed=2)
        second = tokens(llm.generate(prompts, GREEDY, lora_request=ask))
        assert first[0] == first[2] != second[0] == second[2] and len(reads) == 2
        llm.add_lora("x", path, pinned=True)
        llm.add_lora("x", reference.save_adapter(tmp_path / "other", CONFIG, 4))
        assert llm.engine.loop.cache.entry(llm.engine.adapters.get("x").content_hash).pinned
