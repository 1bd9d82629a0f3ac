"""Each compiled program is used once and leaves no trace."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.engine import DeviceEngine
from chameleon_jax.models.llama import random_model
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.step_inputs import Draw, Segment
from chameleon_jax.models.steps import StepBuckets

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=2)
LAYOUT = PageLayout.for_model(CONFIG)
BUCKETS = StepBuckets(
    max_num_seqs=2,
    max_prefill_tokens=32,
    table_width=4,
    max_rank=8,
    max_adapter_pages=LAYOUT.place({t: 8 for t in TARGETS}).num_pages,
)


def test_using_every_program_changes_nothing():
    engine = DeviceEngine(random_model(CONFIG, jnp.dtype("float32")), LAYOUT, BUCKETS, 40, jnp.dtype("float32"))
    prompt = Segment([3, 1, 4, 1, 5], 0, 1, (7,), None)
    draw = {0: Draw(1, 5, 0, 0.0, 0, 1.0, 0.0, (), False)}
    first = int(engine.run([prompt], draw).sampled.tokens[0])
    engine.reset()

    used: list[str] = []
    for kind in ("forward", "sample", "write"):
        programs = getattr(engine.programs, kind)
        for key, program in programs.items():
            programs[key] = lambda *arguments, program=program, kind=kind: (used.append(kind), program(*arguments))[1]
    engine.use_every_program()
    counts = {kind: len(getattr(engine.programs, kind)) for kind in ("forward", "sample", "write")}
    assert {kind: used.count(kind) for kind in counts} == counts and all(counts.values())
    assert not any(np.any(engine.read_page(page)) for page in range(engine.num_pages))
    assert int(engine.run([prompt], draw).sampled.tokens[0]) == first
