"""Programs that are compiled before the first request, and the memory that they need."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models.adapters.transfers import PieceSizes
from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.llama import abstract_model, random_model
from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.compilation import Compilation
from chameleon_jax.models.runtime.model_runner import PAGES_ROUNDED_TO, ModelRunner
from chameleon_jax.models.runtime.programs import STEPS_IN_FLIGHT, Programs
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=1)
LAYOUT = PageLayout.for_model(CONFIG)
BUCKETS = StepBuckets(
    max_num_seqs=2,
    max_prefill_tokens=32,
    table_width=4,
    max_rank=8,
    max_adapter_pages=LAYOUT.place({t: 8 for t in TARGETS}).num_pages,
)
DTYPE = jnp.dtype("float32")
PIECES = PieceSizes.fit(LAYOUT.page_bytes(4), BUCKETS.max_adapter_pages)


def programs(buckets: StepBuckets = BUCKETS, pieces: PieceSizes = PIECES) -> Programs:
    model = random_model(CONFIG, DTYPE)
    graph, params = nnx.split(model)
    return Programs(graph, params, model.output_matrix, LAYOUT, buckets, pieces, DTYPE, "blocked")


@pytest.fixture(scope="module")
def compiled() -> tuple[Programs, list[tuple[int, int]]]:
    """Every program for a pool of 40 pages, and the progress that was reported."""
    made, seen = programs(), []
    made.num_pages = 40
    Compilation(made, 1).compile_all(lambda done, total: seen.append((done, total)))
    return made, seen


def test_everything_is_compiled_once(compiled):
    made, seen = compiled
    shapes = ((1, 1, 0), (2, 2, 0), (32, 2, 2), (40, 2, 4))  # tokens, rows, tiles
    assert set(made.forward) == {(*shape, adapted) for shape in shapes for adapted in (0, 7)}
    kinds = ((False, False), (True, False))  # adjusted or not, and none that adapters change
    assert set(made.sample) == {(n, mode, *kind) for n in (1, 2) for mode in SamplingMode for kind in kinds}
    assert set(made.write) == set(PIECES.all)
    total = len(made.forward) + len(made.sample) + len(made.write) + len(made.count) + len(made.score)
    assert set(made.score) == {64}
    assert seen == [(i, total) for i in range(1, total + 1)]
    assert made.forward[2, 2, 0, 7] is made.forward[2, 2, 0, 7]


def test_no_adapters_no_lora_programs():
    made = programs(dataclasses.replace(BUCKETS, max_adapter_pages=0), PieceSizes.fit(LAYOUT.page_bytes(4), 0))
    assert not any(programs is made.write or (programs is made.forward and key[-1] == 7) for programs, key in made.listing())


@pytest.mark.parametrize(("extras", "expected"), [(False, [49, 48, 2]), (True, [74, 72, 2])])
def test_a_7b_on_a_gpu_has_few_programs(extras, expected):
    layout = PageLayout.for_model(PRESETS["llama-7b"])
    buckets = StepBuckets(
        max_num_seqs=128,
        max_prefill_tokens=2048,
        table_width=128,
        max_rank=128,
        max_adapter_pages=layout.place({t: 128 for t in TARGETS}).num_pages,
        extras=extras,
        **shapes_for("triton"),
    )
    graph, params = nnx.split(abstract_model(PRESETS["llama-7b"], jnp.dtype("bfloat16")))
    pieces = PieceSizes.fit(layout.page_bytes(2), buckets.max_adapter_pages)
    head = jax.ShapeDtypeStruct((32_000, 4096), jnp.bfloat16)
    made = Programs(graph, params, head, layout, buckets, pieces, jnp.dtype("bfloat16"), "triton")
    counts = [sum(kind is programs for programs, _ in made.listing()) for kind in (made.forward, made.sample, made.write)]
    assert counts == expected  # without extras half of the sampling programs change logits first


@pytest.fixture(scope="module")
def scratch() -> int:
    return programs().scratch_bytes()


def test_scratch_is_the_need_of_two_of_the_largest_steps_whatever_the_pool(compiled, scratch):
    made, _ = compiled

    def needs(compiled) -> int:
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    steps = max(map(needs, made.forward.values()))
    others = max(map(needs, [*made.sample.values(), *made.score.values()]))
    assert scratch == STEPS_IN_FLIGHT * (steps + others) + PIECES.device_bytes


class Stats:
    """Memory of a device, as a GPU reports it."""

    def __init__(self, in_use: int):
        self.in_use = in_use

    def memory_stats(self):
        return {"bytes_in_use": self.in_use}


def test_the_pool_takes_the_memory_that_is_left(monkeypatch, scratch):
    monkeypatch.setattr(type(jnp.zeros(1)), "devices", lambda self: {Stats(1_000_000)})
    page_bytes = LAYOUT.page_bytes(4)
    for room, pages in ((100 * page_bytes, 96), (32 * page_bytes, 32), (32 * page_bytes - 1, 16)):
        engine = ModelRunner(
            random_model(CONFIG, DTYPE),
            LAYOUT,
            BUCKETS,
            None,
            DTYPE,
            memory_limit=1_000_000 + scratch + room,
            compile_programs="lazy",
        )
        assert engine.num_pages == pages and pages % PAGES_ROUNDED_TO == 0
        monkeypatch.setattr(
            Programs, "scratch_bytes", lambda self: scratch
        )  # measured by the first engine alone, as it is slow
    with pytest.raises(ValueError, match=f"of {scratch} bytes weights take 1000000 and scratch {scratch}"):
        ModelRunner(random_model(CONFIG, DTYPE), LAYOUT, BUCKETS, None, DTYPE, memory_limit=scratch, compile_programs="lazy")


def test_using_every_program_changes_nothing():
    engine = ModelRunner(random_model(CONFIG, DTYPE), LAYOUT, BUCKETS, 40, DTYPE)
    prompt = SequenceChunk([3, 1, 4, 1, 5], 0, 1, (7,), None)
    sampling_rows = {0: SamplingRow(1, 5, 0, 0.0, 0, 1.0, 0.0, (), False)}
    first = int(engine.run([prompt], sampling_rows).sampled.tokens[0])
    engine.reset()

    used: list[str] = []
    for kind in ("forward", "sample", "write", "count"):
        programs = getattr(engine.programs, kind)
        for key, program in programs.items():
            programs[key] = lambda *arguments, program=program, kind=kind: (used.append(kind), program(*arguments))[1]
    engine.use_every_program()
    counts = {kind: len(getattr(engine.programs, kind)) for kind in ("forward", "sample", "write", "count")}
    assert {kind: used.count(kind) for kind in counts} == counts and all(counts.values())
    assert not any(np.any(engine.read_page(page)) for page in range(engine.num_pages))
    assert int(engine.run([prompt], sampling_rows).sampled.tokens[0]) == first
