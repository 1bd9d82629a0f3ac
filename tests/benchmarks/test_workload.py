from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest

from benchmarks import workload
from benchmarks.__main__ import main
from benchmarks.workload import AZURE, REAL_HIT_RATES, REAL_HIT_RATES_SHUFFLED, WorkloadSpec, generate, lru_hit_rate

LARGE = WorkloadSpec(rps=60, duration_s=600)
LORA_TRACE = dataclasses.replace(LARGE, num_adapters=874, ranks=(8,), adapter_exponent=0.9)
PLAIN = "arrival_s,input_tokens,output_tokens\n0.0,10,1\n1.0,20,2\n4.0,30,3\n6.0,40,0\n"
AZURE_COLUMNS = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.5000000,10,1\n2023-11-16 18:15:47.5000000,20,2\n"
    "2023-11-16 18:15:50.5000000,30,3\n2023-11-16 18:15:52.5000000,40,0\n"
)


def same(one, other, *fields):
    count = min(len(one), len(other))
    return all(np.array_equal(getattr(one, field)[:count], getattr(other, field)[:count]) for field in fields)


def gap_cv(drawn):
    gaps = np.diff(drawn.arrival_s)
    return gaps.std() / gaps.mean()


def hit_rates(adapter):
    return {slots: lru_hit_rate(adapter, slots) for slots in REAL_HIT_RATES}


def write(path, text):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def test_lengths_are_those_of_azure():
    drawn = generate(dataclasses.replace(LARGE, rps=300))
    for name, tokens in (("input", drawn.input_tokens), ("output", drawn.output_tokens)):
        assert tokens.dtype == np.int64 and tokens.min() >= 1
        measured = dict(zip(("mean", "p50", "p90", "p99"), (tokens.mean(), *np.percentile(tokens, [50, 90, 99]))))
        assert measured == pytest.approx(AZURE[name], rel=0.03)
    assert np.corrcoef(drawn.input_tokens, drawn.output_tokens)[0, 1] == pytest.approx(workload.AZURE_CORRELATION, abs=0.03)
    middling = (drawn.input_tokens > 1000) & (drawn.input_tokens < 1150)
    assert np.median(drawn.output_tokens[middling]) == pytest.approx(400, rel=0.05)
    assert np.median(drawn.output_tokens[drawn.input_tokens > 2000]) < 110


def test_lengths_are_scaled_then_cut():
    whole = generate(LARGE)
    half = generate(dataclasses.replace(LARGE, length_factor=0.5, max_input=900, max_output=150))
    assert np.all(np.abs(half.input_tokens - np.minimum(whole.input_tokens / 2, 900)) <= 0.5)
    assert half.input_tokens.max() == 900 and half.output_tokens.max() == 150
    tiny = generate(dataclasses.replace(LARGE, length_factor=1e-4))
    assert tiny.input_tokens.min() == tiny.output_tokens.max() == 1


def test_a_seed_decides_everything():
    spec = dataclasses.replace(LARGE, locality=0.5)
    fields = ("arrival_s", "input_tokens", "output_tokens", "adapter", "ranks")
    assert same(generate(spec), generate(spec), *fields)
    other = generate(dataclasses.replace(spec, seed=1))
    assert not any(same(generate(spec), other, field) for field in fields[:4])


def test_rate_and_locality_change_nothing_else():
    spec = dataclasses.replace(LARGE, locality=0.5)
    base = generate(spec)
    faster = generate(dataclasses.replace(spec, rps=90, shape="spike"))
    assert len(faster) > 1.4 * len(base) and same(base, faster, "input_tokens", "output_tokens", "adapter")
    independent = generate(dataclasses.replace(spec, locality=0))
    assert same(base, independent, "arrival_s", "input_tokens", "output_tokens") and not same(base, independent, "adapter")


def test_popularity_is_equal_over_ranks_and_a_power_law_within():
    drawn = generate(LARGE)
    assert drawn.ranks.tolist() == [8, 16, 32, 64, 128] * 20
    counts = np.bincount(drawn.adapter, minlength=100).reshape(20, 5)
    assert counts.sum(0) / len(drawn) == pytest.approx(np.full(5, 0.2), abs=0.01)
    law = 1 / np.arange(1, 21)
    assert counts.sum(1) / len(drawn) == pytest.approx(law / law.sum(), rel=0.1)
    uniform = generate(dataclasses.replace(LARGE, adapter_exponent=0))
    assert np.bincount(uniform.adapter, minlength=100) / len(uniform) == pytest.approx(np.full(100, 0.01), rel=0.25)


def test_rank_exponent_prefers_small_ranks_in_whatever_order_they_are_given():
    drawn = generate(dataclasses.replace(LARGE, ranks=(64, 8, 16), num_adapters=7, rank_exponent=1))
    share = [np.mean(drawn.ranks[drawn.adapter] == rank) for rank in (8, 16, 64)]
    assert share == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def test_lru_hit_rate():
    adapters = np.array([0, 1, 0, 2, 1, 0, 0])
    assert [lru_hit_rate(adapters, slots) for slots in (1, 2, 3)] == [1 / 7, 2 / 7, 4 / 7]


@pytest.mark.parametrize("seed", [0, 1])
def test_locality_gives_the_hit_rates_of_the_real_trace(seed):
    local = generate(dataclasses.replace(LORA_TRACE, seed=seed, locality=0.84)).adapter
    assert hit_rates(local) == pytest.approx(REAL_HIT_RATES, abs=0.015)
    shuffled = np.random.default_rng(0).permutation(local)
    assert hit_rates(shuffled) == pytest.approx(REAL_HIT_RATES_SHUFFLED, abs=0.035)
    independent = generate(dataclasses.replace(LORA_TRACE, seed=seed)).adapter
    assert hit_rates(independent) == pytest.approx({8: 0.12, 32: 0.30, 128: 0.54}, abs=0.015)


def test_locality_keeps_popularity():
    spec = dataclasses.replace(LARGE, rps=600, locality=0.84)
    drawn = generate(spec)
    expected = workload.popularity(spec, drawn.ranks)
    assert expected.sum() == pytest.approx(1)
    assert np.abs(np.bincount(drawn.adapter, minlength=100) / len(drawn) - expected).max() < 0.01


@pytest.mark.parametrize(
    ("changes", "cv"),
    [({}, 1), ({"arrivals": "gamma", "cv": 0.3}, 0.3), ({"arrivals": "gamma", "cv": 3.0}, 3)],
    ids=["poisson", "regular", "bursty"],
)
def test_arrivals(changes, cv):
    drawn = generate(dataclasses.replace(LARGE, **changes))
    assert np.all(np.diff(drawn.arrival_s) >= 0) and drawn.arrival_s[0] >= 0 and drawn.arrival_s[-1] < 600
    assert len(drawn) == pytest.approx(36_000, rel=0.01 * max(cv, 1))
    assert gap_cv(drawn) == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("period_s", [None, 100.0, 250.0])
@pytest.mark.parametrize("shape", ["diurnal", "spike"])
def test_shapes_keep_the_mean_rate(shape, period_s):
    drawn = generate(dataclasses.replace(LARGE, shape=shape, period_s=period_s))
    assert len(drawn) == pytest.approx(36_000, rel=0.015)
    assert drawn.arrival_s[-1] < 600


def test_diurnal_rate_is_a_sinusoid():
    drawn = generate(dataclasses.replace(LARGE, rps=300, shape="diurnal", period_s=200.0, peak_factor=4.0))
    phase = np.linspace(0, 1, 21)[:-1] + 0.025
    rate = np.histogram(drawn.arrival_s % 200, 20, (0, 200))[0] / 30
    assert rate == pytest.approx(300 * (1 - 0.6 * np.cos(2 * np.pi * phase)), rel=0.06)


def test_spike_rate():
    drawn = generate(dataclasses.replace(LARGE, shape="spike", period_s=100.0, peak_factor=5.0, spike_share=0.2))
    busy = (drawn.arrival_s % 100 >= 40) & (drawn.arrival_s % 100 < 60)
    assert busy.sum() / 120 == pytest.approx(60 * 5 / 1.8, rel=0.03)
    assert (~busy).sum() / 480 == pytest.approx(60 / 1.8, rel=0.03)


@pytest.mark.parametrize(
    "text", [PLAIN, AZURE_COLUMNS, AZURE_COLUMNS.replace("0000,", ","), AZURE_COLUMNS.replace("0000,", "+00:00,")]
)
@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_trace_gives_lengths_and_arrivals(tmp_path, name, text):
    spec = WorkloadSpec(rps=2, duration_s=10, arrivals="trace", trace=write(tmp_path / name, text))
    starts = set()
    for seed in range(20):
        drawn = generate(dataclasses.replace(spec, seed=seed))
        start = drawn.input_tokens[0] // 10 - 1
        order = (start + np.arange(len(drawn))) % 4
        assert drawn.input_tokens.tolist() == (10 * (order + 1)).tolist()
        assert drawn.output_tokens.tolist() == np.array([1, 2, 3, 1])[order].tolist()  # 0 counts as 1
        gaps = np.array([2, 1, 3, 2])[order] / 2 / 2  # gap before each in mean gaps of 2 s, at 2 requests a second
        assert drawn.arrival_s == pytest.approx(np.cumsum(gaps))
        assert 18 <= len(drawn) <= 20
        starts.add(start)
    assert starts == {0, 1, 2, 3}


def test_trace_gives_lengths_alone(tmp_path):
    spec = dataclasses.replace(LARGE, trace=write(tmp_path / "trace.csv", PLAIN), length_factor=2.0, max_input=70)
    drawn = generate(spec)
    assert gap_cv(drawn) == pytest.approx(1, rel=0.05)
    assert set(zip(drawn.input_tokens.tolist(), drawn.output_tokens.tolist())) == {(20, 2), (40, 4), (60, 6), (70, 1)}


def test_trace_rows_are_put_in_order(tmp_path):
    header, *rows = PLAIN.splitlines()
    shuffled = "\n".join([header, rows[2], rows[0], rows[3], rows[1]])
    plain = workload.read_trace(write(tmp_path / "plain.csv", PLAIN))
    assert np.array_equal(plain, workload.read_trace(write(tmp_path / "shuffled.csv", shuffled)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "header of .* is 'a,b'; allowed: one with arrival_s,.* or TIMESTAMP,"),
        ("", "header of .* is ''"),
        (PLAIN.replace("20,2", "20"), "content of .* is '4 rows'; allowed: rows without a gap"),
        (PLAIN[: PLAIN.index("1.0")], "content of .* is '1 rows'"),
    ],
    ids=["columns", "empty", "gap", "one row"],
)
def test_bad_traces_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        generate(dataclasses.replace(LARGE, trace=write(tmp_path / "trace.csv", text)))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rps", 0, "above 0"),
        ("rps", float("nan"), "above 0"),
        ("duration_s", -1.0, "above 0"),
        ("seed", -1, "0 or more"),
        ("length_factor", 0.0, "above 0"),
        ("max_input", 0, "1 or more, or None"),
        ("max_output", 0, "1 or more, or None"),
        ("num_adapters", 0, "1 or more"),
        ("ranks", (), "one or more distinct"),
        ("ranks", (8, 8), "one or more distinct"),
        ("ranks", (0, 8), "one or more distinct"),
        ("rank_exponent", -1.0, "0 or more"),
        ("adapter_exponent", -1.0, "0 or more"),
        ("locality", 1.0, "0 or more, below 1"),
        ("arrivals", "uniform", "poisson, gamma, trace"),
        ("cv", 0.0, "0.01 to 100"),
        ("cv", 2.0, "1 where arrivals is 'poisson'"),
        ("shape", "square", "flat, diurnal, spike"),
        ("peak_factor", 0.5, "1 or more"),
        ("spike_share", 1.0, "above 0, below 1"),
        ("period_s", 601.0, "above 0, at most duration_s"),
    ],
)
def test_bad_fields_are_refused(field, value, allowed):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(LARGE, **{field: value})
    assert str(error.value).startswith(f"{field} is {value!r}; allowed: {allowed}")


def test_arrivals_of_a_trace_need_one():
    with pytest.raises(ValueError, match="trace is None; allowed: a file where arrivals is 'trace'"):
        WorkloadSpec(rps=1, duration_s=1, arrivals="trace")


def test_a_workload_may_be_empty():
    drawn = generate(WorkloadSpec(rps=1e-6, duration_s=1, locality=0.5))
    assert len(drawn) == len(drawn.input_tokens) == len(drawn.adapter) == 0 and len(drawn.ranks) == 100


def test_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["workload", "--rps", "9", "--duration", "600", "--ranks", "8,16", "--shape", "spike"]) == 0
    printed = capsys.readouterr().out
    for row in ("requests/s", "gap CV", "input tokens p99", "output tokens mean", "LRU hits, 128 slots"):
        assert row in printed
    assert main(["workload", "--rps", "9", "--duration", "600", "--locality", "1"]) == 2
    assert "locality is 1.0" in capsys.readouterr().err
