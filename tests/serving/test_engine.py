"""Restarts of an engine over its compiled programs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from chameleon_jax import LLM, AsyncLLM, LoRARequest, SamplingParams
from chameleon_jax.config import EngineConfig
from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.runtime import compilation
from chameleon_jax.models.runtime.buckets import Program
from chameleon_jax.models.runtime.programs import Job
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.model_vocabulary import ModelVocabulary
from chameleon_jax.serving.telemetry.compilations import Compilations
from tests import reference_models as reference
from tests.engines import SETTINGS, Engines

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
RANKS = (2, 8, 40)


@pytest.fixture
def engine(engines: Engines, text_model) -> Iterator[LLMEngine]:
    with engines.borrow(text_model) as engine:
        yield engine


@pytest.fixture
def compiled_engine(engines: Engines, text_model) -> Iterator[LLMEngine]:
    """An engine as a user starts it: every program is compiled."""
    with engines.borrow(text_model, compile_programs="ahead", max_num_seqs=2) as engine:
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


def test_nothing_is_compiled_after_the_start(compiled_engine, adapters):
    compilations = Compilations()
    rng = np.random.default_rng(0)
    for _ in range(4):
        count = int(rng.integers(1, 20))
        prompts = [reference.prompt(int(s), length=int(rng.integers(1, 90))) for s in rng.integers(0, 99, count)]
        params = [
            SamplingParams(
                temperature=float(rng.choice([0, 0.7])),
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([1, 0.8])),
                logprobs=rng.choice([None, 3]),
                max_tokens=int(rng.integers(1, 30)),
            )
            for _ in range(count)
        ]
        loras = [None if rng.random() < 0.3 else adapters[rng.integers(len(adapters))] for _ in range(count)]
        LLM(compiled_engine).generate(prompts, params, lora_request=loras)
    compilations.close()
    assert compilations.at_start == 0


def test_programs_are_compiled_when_steps_need_them():
    sizes = dict(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_pages=28, max_lora_rank=8)
    engine = LLMEngine("tiny", EngineConfig(load_format="dummy", compile_programs="lazy", **sizes))
    programs = engine.runner.programs
    assert not any((programs.forward, programs.sample, programs.write))
    [output] = LLM(engine).generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3
    assert set(programs.forward) == {Program(32, 2, 2, 0), Program(1, 1, 0, 0)}
    assert set(programs.sample) == {(1, SamplingMode.GREEDY, False, False)} and not programs.write and not programs.count
    engine.close()


class HeldQueue:
    """Queue of programs that are compiled when the test says so."""

    def __init__(self, jobs: list[Job], run: Callable[[Job], None], threads: int):
        self._left = jobs

    def start(self) -> None: ...

    @property
    def is_empty(self) -> bool:
        return not self._left

    def want(self, jobs: Iterable[Job]) -> None:
        """A wanted one is not compiled either."""

    def close(self) -> None: ...

    def compile(self, count: int) -> None:
        for job in self._left[:count]:
            job.run()
        del self._left[:count]


def test_programs_that_stand_in_for_others_give_the_same_text(compiled_engine, adapters, monkeypatch, text_model):
    """None, some and all of the programs are compiled in the background."""
    params = [
        SamplingParams(max_tokens=6, temperature=0.8, seed=3, top_k=9),
        SamplingParams(max_tokens=7, temperature=0, logprobs=2),
        SamplingParams(max_tokens=5, temperature=0, presence_penalty=1.5, logit_bias={7: 2.0}),
        GREEDY,
    ]
    prompts = [reference.prompt(seed, length=5 + 11 * seed) for seed in range(4)]

    def answers(engine: LLMEngine) -> list[object]:
        found: list[object] = []
        for some in (slice(1), slice(4)):
            loras = [None, *adapters][some]
            for output in LLM(engine).generate(prompts[some], params[some], lora_request=loras):
                logprobs = output.outputs[0].logprobs
                found += [output.outputs[0].token_ids, None if logprobs is None else [sorted(row) for row in logprobs]]
        return found

    expected = answers(compiled_engine)
    monkeypatch.setattr(compilation, "CompileQueue", HeldQueue)
    config = EngineConfig(**SETTINGS | {"max_num_seqs": 2, "compile_programs": "background"})
    with contextlib.closing(LLMEngine(str(text_model), config)) as engine:
        queue = engine.runner.compilation._queue
        assert isinstance(queue, HeldQueue) and len(engine.runner.programs.forward) == 2
        with contextlib.closing(Compilations()) as compilations:
            assert answers(engine) == expected
            assert compilations.at_start == 0
        while not queue.is_empty:
            queue.compile(10)
            assert answers(engine) == expected
        with contextlib.closing(Compilations()) as compilations:
            assert answers(engine) == expected
            assert compilations.at_start == 0
        assert 0 < engine.loop.scheduler._budget._cost.num_steps < engine.loop.counters.steps / 2
        assert engine.runner.programs.num_compiled == engine.runner.programs.num_programs


def test_every_setting_gives_the_same_text_over_the_same_programs(compiled_engine, adapters):
    engine = compiled_engine
    before = ask(engine, adapters)
    compilations = Compilations()
    for settings in (
        dict(system="s-lora"),
        dict(num_pages=80, lora_host_bytes=0),
        dict(max_num_seqs=1),
        dict(max_num_batched_tokens=32),
        dict(max_num_seqs=1, max_num_batched_tokens=32, max_model_len=40),
        dict(system="chameleon", predicted_output_len=1, max_lora_rank=40),
        dict(system="s-lora-published"),
        dict(system="chameleon-published", max_num_batched_tokens=32),
    ):
        engine.restart(**settings)
        assert ask(engine, []) == [] and engine.loop.counters.steps == 0
        assert ask(engine, adapters) == before
        assert engine.loop.pool.capacity == settings.get("num_pages", engine.built.num_pages) - 1
        assert len(engine.loop.scheduler.running) == 0 and engine.config.system == settings.get("system", "chameleon-plus")
    compilations.close()
    assert compilations.at_start == 0


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
        (dict(max_lora_rank=1), "max_lora_rank is 1; allowed: at least 2, the rank of adapter 'a0'"),
        (dict(length_proxy="/nowhere"), "/nowhere"),
        (dict(generation_config="BROKEN"), "generation_config.json"),
    ],
)
def test_a_setting_that_cannot_be_had_changes_nothing(engine, adapters, tmp_path, settings, match):
    if settings.get("generation_config") == "BROKEN":
        (tmp_path / "generation_config.json").write_text("{")
        settings = {"generation_config": str(tmp_path)}
    engine.add_lora("a0", adapters[0].path, pinned=True)
    request, loop, config = submit(engine), engine.loop, engine.config
    with pytest.raises(ValueError, match=match):
        engine.restart(**settings)
    assert engine.loop is loop and engine.config is config and request.finish_reason is None


def test_adapters_are_sent_as_often_as_the_system_says(engine, adapters):
    for system, times in (("s-lora-published", 2), ("fifo", 1)):
        engine.restart(system=system)
        ask(engine, adapters)
        counters = engine.loop.cache.counters
        assert counters.bytes_sent == times * counters.bytes_loaded > 0


def test_spills_are_counted_from_the_restart(engine, adapters):
    engine.restart(lora_host_bytes=0)
    ask(engine, adapters)
    assert engine.store.num_spills > 0
    engine.restart()
    assert engine.store.num_spills == 0


def test_a_refused_request_takes_no_seed_from_the_next(engine, monkeypatch):
    config = dataclasses.replace(engine.model_config, eos_token_ids=(1,))
    monkeypatch.setattr(engine, "vocabulary", ModelVocabulary(config, engine.tokenizer))
    drawn = SamplingParams(temperature=1.0, max_tokens=4)
    first = engine.submit([1], drawn)
    engine.restart()
    with pytest.raises(ValueError, match="stop_token_ids and the model's own"):
        engine.submit([1], SamplingParams(stop_token_ids=range(100, 108)))
    assert engine.submit([1], drawn).seed == first.seed


def test_a_wrong_setting_is_found_before_anything_is_compiled(text_model, tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    for wrong in (dict(generation_config=str(tmp_path)), dict(length_proxy="/nowhere")):
        compilations = Compilations()
        with pytest.raises(ValueError, match=r"generation_config.json|/nowhere"):
            LLM(str(text_model), dtype="float32", max_model_len=97, max_num_seqs=3, **wrong)
        compilations.close()
        assert compilations.at_start < 10  # the weights' programs alone


def test_an_engine_that_was_lent_is_left_without_requests(engine):
    async def main() -> None:
        async with AsyncLLM(engine) as llm:
            stream = await llm.open([1], SamplingParams(max_tokens=100, ignore_eos=True))
            await anext(stream)

    asyncio.run(main())
    assert engine.loop.unfinished == []
    [output] = LLM(engine).generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3 and engine.loop.pool.usage().kv == 0


def test_settings_beside_an_engine_are_refused(engine):
    with pytest.raises(ValueError, match="num_pages: allowed with a model's name"):
        LLM(engine, num_pages=60)
