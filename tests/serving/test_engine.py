"""Restarts of an engine over its compiled programs."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.serving.engine import LLMEngine
from tests import reference_models as reference
from tests.engines import Engines

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
RANKS = (2, 8, 40)


@pytest.fixture
def engine(engines: Engines, text_model) -> Iterator[LLMEngine]:
    with engines.borrow(text_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(f"a{i}", str(reference.save_adapter(folder / f"a{i}", reference.CONFIGS["gqa"], rank, seed=i)))
        for i, rank in enumerate(RANKS)
    ]


def ask(engine: LLMEngine, adapters: list[LoRARequest]) -> list[list[int]]:
    prompts = [reference.prompt(seed, length=9 + seed) for seed in range(2 * len(adapters))]
    outputs = LLM(engine).generate(prompts, GREEDY, lora_request=adapters * 2)
    return [output.outputs[0].token_ids for output in outputs]


def submit(engine: LLMEngine, adapter: LoRARequest | None = None, max_tokens: int = 40) -> Request:
    return engine.submit(reference.prompt(1), SamplingParams(max_tokens=max_tokens, ignore_eos=True), adapter)


def test_every_setting_gives_the_same_text_over_the_same_programs(engine, adapters):
    before = ask(engine, adapters)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **kw: compiled.append(name) if "backend_compile" in name else None
    )
    for settings in (
        dict(system="s-lora"),
        dict(num_pages=80, lora_host_bytes=0),
        dict(max_num_seqs=1),
        dict(max_num_batched_tokens=32),
        dict(max_num_seqs=3, max_num_batched_tokens=32, max_model_len=40),
        dict(system="chameleon", predicted_output_len=1, max_lora_rank=40),
    ):
        engine.restart(**settings)
        assert ask(engine, []) == [] and engine.loop.counters.steps == 0
        assert ask(engine, adapters) == before
        assert engine.loop.pool.capacity == settings.get("num_pages", engine.built.num_pages) - 1
        assert len(engine.loop.scheduler.running) == 0 and engine.config.system == settings.get("system", "chameleon-plus")
    jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_adapters_keep_names_paths_and_pins(engine, adapters):
    for lora in adapters:
        engine.add_lora(lora.name, lora.path, pinned=lora is adapters[1])
    engine.restart(system="fifo")
    assert engine.list_loras() == ["a0", "a1", "a2"]
    assert [engine.adapters.is_pinned(name) for name in engine.list_loras()] == [False, True, False]
    assert not any(engine.must_read(lora) for lora in adapters)
    assert engine.loop.cache.entry(engine.adapters.named("a1").content_hash).pinned


def test_unfinished_requests_are_aborted_and_loads_dropped(engine, adapters):
    running, waiting = submit(engine), submit(engine, adapters[0])
    engine.loop.step(wait=False)
    engine.remove_lora("a0")
    engine.restart()
    assert {running.finish_reason, waiting.finish_reason} == {FinishReason.ABORT}
    assert not engine.loop.has_unfinished and engine.loop.pool.num_free == engine.loop.pool.capacity
    assert engine.list_loras() == [] and engine.store.bytes_in_memory == 0  # no name has it, and no request any more
    assert ask(engine, adapters) == ask(engine, adapters)


def test_an_engine_restarts_after_a_step_that_failed(engine, adapters, monkeypatch):
    before = ask(engine, adapters)
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.executor, "dispatch", lambda plan: 1 / 0)
        submit(engine)
        with pytest.raises(ZeroDivisionError):
            engine.loop.step()
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        engine.loop.step()
    engine.restart()
    assert ask(engine, adapters) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(dtype="bfloat16"), "dtype is 'bfloat16'; allowed: 'float32', for which this engine was built"),
        (dict(page_tokens=32), "page_tokens is 32; allowed: 16"),
        (dict(max_num_seqs=33), "max_num_seqs is 33; allowed: at most 32"),
        (dict(max_model_len=129), "max_model_len is 129; allowed: at most 128"),
        (dict(num_pages=1201), "num_pages is 1201; allowed: at most 1200"),
        (dict(num_pages=None), "num_pages is None; allowed: at most 1200"),
        (dict(tbt_slo=-1.0), "tbt_slo is -1.0"),
        (dict(generation_config="nowhere"), "generation_config is 'nowhere'"),
        (dict(num_pages=3), "num_pages is 3; allowed: more than"),
    ],
)
def test_a_setting_that_cannot_be_had_changes_nothing(engine, adapters, settings, match):
    engine.add_lora("a0", adapters[0].path, pinned=True)
    request, loop = submit(engine), engine.loop
    with pytest.raises(ValueError, match=match):
        engine.restart(**settings)
    assert engine.loop is loop and request.finish_reason is None


def test_settings_beside_an_engine_are_refused(engine):
    with pytest.raises(ValueError, match="num_pages: allowed with a model's name"):
        LLM(engine, num_pages=60)
