"""The soak's short form: the same harness on a small model for a few seconds."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from benchmarks.soak.jobs import prepare
from benchmarks.soak.soak import Soak, failures, soak
from chameleon_jax.serving.async_llm import AsyncLLM
from tests import reference_models as reference

SETTINGS = dict(max_num_seqs=4, max_num_batched_tokens=32, max_lora_rank=16, num_pages=64)
PLAN = Soak(clients=12, names=3, warm_up=1.0, seconds=3.0, pause=0.05)


@pytest.fixture(scope="module")
def result(engines, text_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    root = folder / "adapters"
    contents = [
        str(reference.save_adapter(root / name, reference.CONFIGS["gqa"], rank, seed=seed))
        for seed, (name, rank) in enumerate(
            [("f0", 2), ("f1", 16), ("variants/c0", 8), ("variants/c1", 16), ("variants/c2", 4)]
        )
    ]
    prompts = [("love is", 24), ("0123456789", 48), ("the heart of man", 12)]
    with engines.borrow(text_model, **SETTINGS) as engine:
        jobs = prepare(engine, prompts, contents[:2], contents[2:], {})
        for name in engine.list_loras():
            engine.remove_lora(name)
        with contextlib.closing(AsyncLLM(engine)) as llm:
            return asyncio.run(soak(llm, root, jobs, PLAN))


def test_every_text_is_right_and_nothing_is_left(result):
    found = [text for text in failures(result) if not text.startswith("threads")]  # pools of threads are still filling
    assert found == []


def test_it_was_a_soak(result):
    assert sum(count for kind, count in result["requests"].items() if "refused" not in kind) > 2 * PLAN.clients
    assert {"stream", "unary", "grpc"} <= set(result["requests"])
    assert result["adapters"]["replaced"] > 5 and result["loads"] > 5
    assert result["milliseconds"]["step, none moves"]["count"] > 0


def test_what_is_wrong_is_found(result):
    wrong = dict(result, wrong_texts=["stream a: 'x'"], errors=["unary b: 500"], drained=False, faults=2)
    wrong["requests"] = {"refused: 429": 7}
    wrong["held_after"] = {name: value + 1 for name, value in result["held_before"].items()}
    found = "\n".join(failures(wrong))
    for what in (
        "wrong text",
        "error: unary",
        "kv_pages grew",
        "adapters grew",
        "host_bytes grew",
        "file_descriptors",
        "finish",
        "failed 2 times",
        "no request was answered",
    ):
        assert what in found
    wrong["held_after"]["rss_mib"] = result["held_before"]["rss_mib"] + 1000
    assert "memory grew" in "\n".join(failures(wrong))
