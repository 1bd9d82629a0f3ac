from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from benchmarks.__main__ import main
from benchmarks.paper import load_figures, reproduce, runs
from benchmarks.paper.runs import Cache, Run, Runner, fingerprint
from benchmarks.paper.statistics import change, estimate, find_knees, search_knee
from benchmarks.paper.study import Settings, Study
from benchmarks.paper.summary import BINS
from benchmarks.paper.tables import Check, Table, cell, compare, number
from benchmarks.workload import WorkloadSpec
from chameleon_jax.systems import SYSTEMS

RUN = Run("chameleon", WorkloadSpec(4.0, 8.0, length_factor=0.1))
TINY = Settings(seeds=(0, 1), duration_s=8.0, loads=(6.0,), tolerance=0.5)


@pytest.fixture
def executions(monkeypatch):
    """Record runs that are simulated, not read from the cache."""
    done, execute = [], runs.execute

    def counted(run):
        done.append(run)
        return execute(run)

    monkeypatch.setattr(runs, "execute", counted)
    return done


def test_cache_resumes_where_an_interruption_left_it(tmp_path, executions):
    both = [RUN, RUN.at(seed=1)]
    with Runner(Cache(tmp_path, "sources"), workers=1) as runner:
        runner.run(both)
    whole = {run: runner.cache.get(run) for run in both}
    path = runner.cache.path
    path.write_bytes(path.read_bytes()[:-20])  # the last line was being written
    with Runner(Cache(tmp_path, "sources"), workers=1) as runner:
        assert len(runner.cache) == 1
        runner.run(both)
    assert executions == [*both, both[1]]
    assert {name: v for name, v in runner.cache.get(both[1]).items() if name != "wall_s"} == {
        name: v for name, v in whole[both[1]].items() if name != "wall_s"
    }
    assert len(Cache(tmp_path, "sources")) == 2, "the torn line spoils none that follows it"


def test_other_sources_share_nothing(tmp_path, executions):
    for sources in ("before", "after", "before"):
        Runner(Cache(tmp_path, sources), workers=1).run([RUN])
    assert len(executions) == 2


def test_fingerprint_follows_content_and_names(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    first = fingerprint(tmp_path, ["*.py"])
    assert fingerprint(tmp_path, ["*.py"]) == first
    source.write_text("x = 2\n")
    second = fingerprint(tmp_path, ["*.py"])
    source.rename(tmp_path / "b.py")
    assert len({first, second, fingerprint(tmp_path, ["*.py"])}) == 3


def test_every_source_pattern_matches_a_file():
    assert all(list(runs.ROOT.glob(pattern)) for pattern in runs.SOURCES)


def test_key_is_of_the_content(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,1,1\n1,2,2\n")
    assert RUN.key() == dataclasses.replace(RUN, system=SYSTEMS["chameleon"]).key()
    assert dataclasses.replace(RUN, profile="a100-80gb").key() == dataclasses.replace(RUN, profile="a100-tp1").key()
    others = [
        dataclasses.replace(RUN, system="s-lora"),
        dataclasses.replace(RUN, profile="a100-80gb"),
        dataclasses.replace(RUN, predictor="oracle"),
        dataclasses.replace(RUN, timeline=True),
        RUN.at(seed=1),
        RUN.at(trace=trace),
    ]
    assert len({run.key() for run in [RUN, *others]}) == 7


def test_workers_agree_with_one_process(tmp_path):
    many = [RUN.at(seed=seed) for seed in range(3)]
    with Runner(Cache(tmp_path / "one", "s"), 1) as one, Runner(Cache(tmp_path / "two", "s"), 2) as two:
        one.run(many)
        two.run(many)
    for run in many:
        a, b = one.cache.get(run), two.cache.get(run)
        assert {k: v for k, v in a.items() if k != "wall_s"} == {k: v for k, v in b.items() if k != "wall_s"}


@pytest.mark.parametrize("start", [1.0, 8.0, 100.0])
def test_knee_search_finds_thresholds(start):
    true = {"a": 8.6, "b": 0.5, "c": 200.0}
    rounds = []

    def measure(loads):
        rounds.append(loads)
        return {key: 5.0 * (rps / true[key]) ** 8 for key, rps in loads.items()}

    found = find_knees({key: search_knee(start, 5.0, 0.01) for key in true}, measure)
    assert found == pytest.approx(true, rel=1e-6)
    assert list(found) == list(true) and len(rounds) < 25


def test_knee_search_of_a_step():
    search = search_knee(8.0, 5.0, 0.01)
    found = find_knees({0: search}, lambda loads: {0: 1.0 if loads[0] <= 9.3 else 400.0})[0]
    assert 9.3 / 1.01 < found < 9.3 * 1.01


@pytest.mark.parametrize("value, knee", [(9.0, math.nan), (1.0, math.inf)])
def test_knee_search_without_one(value, knee):
    found = find_knees({0: search_knee(8.0, 5.0, 0.01)}, lambda loads: {0: value})[0]
    assert found == pytest.approx(knee, nan_ok=True)


def test_estimates():
    interval = estimate([1.0, 2.0, 3.0])
    assert interval.value == 2 and interval.high - 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert math.isnan(estimate([1.0]).low)
    halved = change([1.0, 2.0], [2.0, 4.0])
    assert [halved.value, halved.low, halved.high] == pytest.approx([-50.0] * 3)
    assert change([1.0, 4.0], [2.0, 2.0]).value == pytest.approx(0), "half and twice even out"


def test_cells():
    assert [number(v) for v in (0.01234, 1.0, 12.34, 123.4, 12345.0, math.inf)] == [
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "12,345",
        "over 512",
    ]
    assert cell(None) == "-" and cell("text") == "text" and number(1.0, True) == "+1.00"
    row = compare("knee", 8.6, estimate([8.0, 9.0]), "RPS")
    assert row["quantity"] == "knee, RPS" and row["difference"] == pytest.approx(-0.1)
    assert compare("share", "under 8", 9.0)["difference"] is None
    table = Table("T", [{"a": 1.0}, {"b": "x"}], "Simulated.", "Note.")
    assert "| a | b |\n|---|---|\n| 1.00 | - |\n| - | x |" in table.markdown() and "Simulated." in table.markdown()


def test_checks_report_what_is():
    assert Check("order", [("a", 1.0), ("b", 1.0), ("c", 2.0)]).text().startswith("PASS")
    assert Check("order", [("a", 1.0), ("b", 3.0), ("c", 2.0)]).text().startswith("DIFFERS")
    assert not Check("order", [("a", 1.0), ("b", math.nan)]).passes


def test_a_figure_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.setattr(load_figures, "SYSTEMS", ("s-lora", "s-lora-published", "chameleon"))
    monkeypatch.setattr(load_figures, "OURS", ("chameleon",))
    call = ["paper", "--quick", "--figure", "13", "--figure", "2", "--out", str(tmp_path), "--workers", "1"]
    assert main(call) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {row["quantity"]: row for row in result["figures"]["13"]["tables"][0]["rows"]}
    row = rows["P50 TTFT of chameleon against s-lora at 9 RPS, %"]
    assert row["difference"] == pytest.approx(row["ours"]["mean"] - row["paper"], abs=1e-3) and row["paper"] == -48.1
    assert all(len(point["ttft_p99"]) == 2 for point in result["figures"]["13"]["per_seed"])
    assert result["simulator"]["tokens_per_s"] > 0 and {"machine", "command", "date", "sources"} <= set(result)
    text = (tmp_path / "tables.md").read_text()
    assert "Simulated, not measured on hardware. Profile a40-llama-7b; seeds 0, 1" in text
    for image in re.findall(r"\((figure-.*\.png)\)", text):
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(call) == 0
    assert "figure 13: 0 runs" in capsys.readouterr().err, "all of it came from the cache"


def test_unknown_figure_is_named(capsys):
    assert main(["paper", "--figure", "99"]) == 2 and "99" in capsys.readouterr().err


def test_ablations_turn_one_choice_each():
    from benchmarks.paper import extra_figures

    plus, theirs = SYSTEMS[extra_figures.PLUS], SYSTEMS["chameleon"]
    for system in extra_figures.ablations().values():
        turned = [f.name for f in dataclasses.fields(system) if getattr(system, f.name) != getattr(plus, f.name)]
        assert len(turned) == 1 and getattr(system, turned[0]) == getattr(theirs, turned[0])


def test_knees_of_a_study(tmp_path):
    study = Study(dataclasses.replace(TINY, seeds=(0,)), Runner(Cache(tmp_path, "s"), 1))
    knee = study.knees({"x": study.case("s-lora", length_factor=1.0)}, start=2.0)["x"]
    assert 0.25 < knee < 512 and study.points


def test_summary_survives_json_and_is_modest():
    plain, timed = runs.execute(RUN), runs.execute(dataclasses.replace(RUN, timeline=True))
    assert all(isinstance(value, float) and math.isfinite(value) for value in plain.values())
    assert json.loads(json.dumps(timed)) == timed and len(json.dumps(timed)) < 10_000
    lines = {name: value for name, value in timed.items() if name not in plain}
    assert len(lines) == 5 and {len(line) for line in lines.values()} == {BINS}
    shares = [sum(parts) for parts in zip(lines["kv_line"], lines["adapters_line"], lines["free_line"]) if None not in parts]
    assert shares == pytest.approx([1.0] * len(shares)) and shares
