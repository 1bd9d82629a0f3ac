"""The benchmark against the engine, on a tiny model: it runs, ends requests where it must, and memory moves as designed."""

from __future__ import annotations

import importlib.util
import itertools
import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.serving import comparison, serve_curve
from benchmarks.serving.calibrate import Timings, fit, slowness
from benchmarks.serving.comparison import RATIOS, Settings, build_engine, ratios
from benchmarks.simulator.calibration import STEP_TERMS
from benchmarks.simulator.simulate import STOP, step_tokens
from benchmarks.workload import Workload
from chameleon_jax.outputs import FinishReason

NUM_PAGES, NUM_ADAPTERS, RANK, LONGEST = 28, 6, 8, 128
SETTINGS = Settings("history", 0.1, 5.0, 0.3, 32, 2)


@pytest.fixture(scope="module")
def engine():
    """27 pages; its six adapters take four each."""
    request = Workload(np.zeros(1), np.array([100]), np.array([24]), np.zeros(1, int), np.full(NUM_ADAPTERS, RANK))
    engine = build_engine(
        "tiny", [request], ["chameleon"], SETTINGS, {"num_pages": NUM_PAGES, "load_format": "dummy", "compile_programs": "lazy"}
    )
    assert engine.max_model_len == LONGEST
    yield engine
    engine.close()


def test_ratios_pair_the_passes():
    base = [{name: 10.0 * 3**i for name in RATIOS} for i in range(4)]  # passes differ by far more than the systems do
    factors = [2.0, 0.5, 2.0, 2.0]
    ours = [{name: value * factor for name, value in row.items()} for row, factor in zip(base, factors)]
    (row,) = ratios({"ours": {"passes": ours}, "base": {"passes": base}})
    assert row.pop("over base") == "ours"
    mean, half = np.log(2) / 2, 3.18245 * np.log(2) / 2  # three of four double; t of 3 degrees of freedom, standard error
    low, high = np.exp(mean - half), np.exp(mean + half)
    assert set(row.values()) == {f"{np.exp(mean):.3f} ({low:.3f} to {high:.3f})"} and list(row) == list(RATIOS)


def start(engine, lengths: dict[str, int], system: str = "chameleon") -> None:
    ticks = itertools.count()
    engine.start_run(lengths, system=system, clock=lambda: next(ticks) * 1e-3, predicted_output_len=24)


def finish(engine) -> list:
    """Run to the end, and return the memory after each step."""
    usages = []
    while engine.loop.has_unfinished:
        engine.loop.step()
        usages.append(engine.loop.pool.usage())
    return usages


def touch(engine, names: itertools.count) -> list:
    """One short request for each adapter, one after the other."""
    usages = []
    for adapter in range(NUM_ADAPTERS):
        engine.submit_drawn(f"touch-{next(names)}", [5] * 8, 4, adapter, 0.0)
        usages += finish(engine)
    return usages


def test_in_a_spike_adapters_give_their_memory_to_kv_and_get_it_back(engine):
    names = itertools.count()
    lengths = {f"touch-{i}": 2 for i in range(2 * NUM_ADAPTERS)} | {f"long-{i}": 24 for i in range(8)}
    start(engine, lengths)
    quiet = touch(engine, names)
    grown = quiet[-1].adapters
    assert grown == NUM_ADAPTERS * 4 and quiet[-1].kv == 0
    assert [u.adapters for u in quiet] == sorted(u.adapters for u in quiet)  # nothing needed their memory

    for i in range(8):
        engine.submit_drawn(f"long-{i}", [7] * 100, 24, i % 2, 0.0)
    burst = finish(engine)
    assert max(u.kv for u in burst) >= 14  # two requests, of eight pages at their ends
    low = min(u.adapters for u in burst)
    assert low <= grown / 2
    assert all(u.free + u.kv + u.adapters == NUM_PAGES - 1 for u in burst)
    assert burst[-1].kv == 0 and burst[-1].adapters < grown

    again = touch(engine, names)
    assert again[-1].adapters == grown
    assert engine.loop.cache.counters.evictions > 0


@pytest.mark.parametrize("system", ["s-lora", "chameleon-plus"])
def test_requests_end_where_the_benchmark_says(engine, system):
    lengths = {"a": 1, "b": 5, "c": 24}
    start(engine, lengths, system)
    requests = [engine.submit_drawn(name, [9] * 20, 24, i, 0.0) for i, name in enumerate(lengths)]
    finish(engine)
    for request in requests:
        assert len(request.output_token_ids) == lengths[request.request_id]
        assert request.output_token_ids.index(STOP) == len(request.output_token_ids) - 1
        assert request.finish_reason is FinishReason.STOP


def test_a_restart_empties_the_cache(engine):
    start(engine, {"a": 2})
    engine.submit_drawn("a", [9] * 20, 24, 0, 0.0)
    with pytest.raises(RuntimeError, match="unfinished"):
        start(engine, {})
    finish(engine)
    assert engine.loop.pool.usage().adapters > 0
    start(engine, {})
    assert engine.loop.pool.usage().free == NUM_PAGES - 1


def test_a_calibration_finds_the_costs_it_was_made_from():
    rng = np.random.default_rng(0)
    cost = rng.random(len(STEP_TERMS))
    terms = rng.integers(0, 100, (200, len(STEP_TERMS))).astype(float)
    timings = Timings(terms.tolist(), (terms @ cost).tolist(), [0.25], [(pieces, 0.5 + 2.0 * pieces) for pieces in range(1, 9)])
    calibration = fit(timings)
    np.testing.assert_allclose(calibration.step, cost, rtol=1e-6)
    np.testing.assert_allclose(calibration.load, (0.5, 2.0), rtol=1e-6)
    assert calibration.host == 0.25 and calibration.error < 1e-6
    assert slowness(calibration.slowed(0.5), timings) == pytest.approx(2.0)


@pytest.fixture
def built(engine, monkeypatch) -> list:
    """Arguments of `build_engine`, which gives the commands this module's engine; test_gpu_machine.py has one build its own."""
    calls: list = []
    for module in (comparison, serve_curve):
        monkeypatch.setattr(module, "build_engine", lambda *arguments: calls.append(arguments) or engine)
    monkeypatch.setattr(engine, "close", lambda: None)
    return calls


def test_the_command_writes_what_it_measured_and_predicted(built, tmp_path):
    pictures = importlib.util.find_spec("matplotlib") is not None  # not among the tests' packages
    plots = f"--plots {tmp_path}" if pictures else ""
    options = f"""serve tiny --load-format dummy --system s-lora --system chameleon --rps 10 --duration 0.5 --length-factor 0.1
        --max-input 100 --max-output 24 --num-adapters {NUM_ADAPTERS} --ranks {RANK} --num-pages {NUM_PAGES} --max-num-seqs 2
        --max-num-batched-tokens 32 --predict --calibration-s 0.5 --out {tmp_path}/result.json {plots}"""
    assert main(options.split()) == 0
    ((model, _, systems, settings, config),) = built
    assert (model, systems, config["num_pages"], config["load_format"]) == ("tiny", ["s-lora", "chameleon"], NUM_PAGES, "dummy")
    assert (settings.max_num_seqs, settings.batched_tokens) == (2, 32)
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written["systems"]) == {"s-lora", "chameleon"}
    for system in written["systems"].values():
        [measured], [predicted] = system["passes"], system["predicted"]
        assert 0 < measured["ttft_p50_ms"] <= measured["ttft_p99_ms"]
        assert predicted["steps"] > 0
        assert len(system["memory"]["seconds"]) == len(system["memory"]["kv_pages"]) > 1
    assert (tmp_path / "result.png").is_file() == pictures


def test_a_system_that_bounds_stalls_may_take_longer_prompts():
    assert step_tokens("chameleon", 128) == 128
    assert step_tokens("chameleon-plus", 128) == 512


def test_a_curve_has_every_system_at_every_load(built, tmp_path):
    sizes = "--num-adapters 4 --ranks 8 --max-num-seqs 2 --max-num-batched-tokens 32 --num-pages 28 --lora-host-gib 1"
    traffic = (
        "--rps 16 --rps 8 --duration 0.4 --length-factor 0.05 --max-input 64 --max-output 16 --system fifo --system s-lora"
    )
    out = tmp_path / "curve.json"
    assert main(["serve-curve", "tiny", *sizes.split(), *traffic.split(), "--out", str(out)]) == 0
    ((model, workloads, systems, settings, config),) = built
    assert (model, systems, len(workloads), config["num_pages"]) == ("tiny", ["fifo", "s-lora"], 2, NUM_PAGES)
    assert (settings.max_num_seqs, settings.batched_tokens) == (2, 32)
    table = json.loads(out.read_text())["table"]
    assert [(row["requests a second"], row["system"]) for row in table] == [(n, s) for n in (8, 16) for s in ("fifo", "s-lora")]
    assert all(row["requests"] > 0 and row["ttft_p99_ms"] > 0 for row in table)
