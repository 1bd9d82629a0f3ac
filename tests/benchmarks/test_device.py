"""The device benchmark in its small form: what it records, and that one case's trouble is its own."""

from __future__ import annotations

import time

import pytest

from benchmarks.device import runner, supervisor
from benchmarks.device.report import Case, Report
from benchmarks.device.scale import FULL, SMALL, Mix
from benchmarks.device.workbench import shared

CHEAP = {
    "machine": ("device", "memory", "matrices", "link"),
    "correctness": ("paged_attention, decode, heads grouped, float32", "write_kv, float32", "sampling, tokens"),
    "decode": ("compile", "4 rows, 96 tokens, base", "4 rows, 96 tokens, mixed ranks, all seven"),
    "ops": ("attention, 4 rows, 96 tokens", "adapters, 4 rows, mixed ranks, all seven", "write_kv"),
    "prefill": ("4 prompts of 16, mixed ranks, all seven",),
    "loads": ("rank 16", "steps of 4 rows meanwhile"),
    "host": ("parts of a step, mixed ranks, q k v o", "the loop, mixed ranks, q k v o"),
    "variants": ("as it is",),
}
"""Sections and those of their cases that take a second or a few."""


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path)


def in_an_hour() -> float:
    return time.time() + 3600


def with_cases(monkeypatch, *cases: Case) -> None:
    monkeypatch.setattr(runner, "cases_of", lambda section, scale, report, deadline: list(cases))


@pytest.mark.parametrize("section", CHEAP)
def test_sections_in_small(section, report, monkeypatch):
    monkeypatch.setattr("benchmarks.device.timing.TARGET_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.device.loads.STEPS", 20)
    cases = {case.name: case for case in runner.cases_of(section, SMALL, report, in_an_hour())}
    with_cases(monkeypatch, *(cases[name] for name in CHEAP[section]))
    runner.run_sections([section], SMALL, report, in_an_hour())
    assert not report.failures
    assert all(report.has(section, name) for name in CHEAP[section])
    assert report.rows(section) and not any("skipped" in row for row in report.rows(section))
    assert f"## {section}" in report.text()


def test_every_section_has_cases_with_names_of_their_own(report):
    for section in runner.SECTIONS:
        for scale in (SMALL, FULL):
            names = [case.name for case in runner.cases_of(section, scale, report, 0.0)]
            assert names and len(names) == len(set(names))


def test_a_case_that_raises_is_recorded_and_the_rest_goes_on(report, monkeypatch, tmp_path):
    with_cases(monkeypatch, Case("bad", lambda: 1 / 0), Case("good", lambda: [{"x": 1}]), Case("off", lambda: [{"ok": False}]))
    runner.run_sections(["decode"], SMALL, report, in_an_hour())
    assert report.failures == ["decode: bad", "decode: off"]
    assert report.rows("decode") == [{"x": 1}, {"ok": False}]
    assert "ZeroDivisionError" in report.text()
    assert Report(tmp_path).content == report.content  # on disk as it is in memory


def test_a_lost_device_ends_the_process_and_the_next_goes_on(report, monkeypatch):
    with_cases(monkeypatch, Case("bad", lambda: 1 / 0), Case("good", lambda: [{"x": 1}]))
    monkeypatch.setattr(runner, "_device_works", lambda: False)
    with pytest.raises(runner.DeviceLost):
        runner.run_sections(["decode"], SMALL, report, in_an_hour())
    assert report.doing is None and not report.has("decode", "good")
    runner.run_sections(["decode"], SMALL, report, in_an_hour())
    assert report.rows("decode") == [{"x": 1}]


def test_nothing_starts_after_the_deadline(report, monkeypatch):
    with_cases(monkeypatch, Case("late", lambda: [{"x": 1}]))
    runner.run_sections(["decode"], SMALL, report, time.time() - 1)
    assert not report.rows("decode") and not report.failures
    assert "late: skipped: the time was up" in report.text()


def test_a_process_that_dies_costs_the_case_that_it_was_doing(tmp_path, monkeypatch):
    ended = ["Segmentation fault\nexit code -11", None]

    def process(sections, out, small, deadline):
        if len(ended) == 2:
            Report(out).begin("decode", "1 rows")
        return ended.pop(0)

    monkeypatch.setattr(supervisor, "_run_process", process)
    supervisor._run_group(["decode"], tmp_path, True, in_an_hour())
    assert not ended
    assert Report(tmp_path).failures == ["decode: 1 rows"]


def test_the_command_writes_both_files(tmp_path, capsys):
    assert supervisor.supervise(["machine"], tmp_path, True, 60.0) == 0
    assert Report(tmp_path).ceilings.keys() == {"copy", "read", "matrix", "link"}
    assert "copy, bytes read and written" in (tmp_path / "device.md").read_text()


def test_floor_counts_what_a_step_must_read():
    bench = shared(SMALL)
    config = SMALL.config
    base = bench.decode(4, 96, Mix("base"))
    mixed = bench.decode(4, 96, Mix("two", (4, 8), ("q_proj", "down_proj")))
    weights = config.num_params - config.vocab_size * config.hidden_size
    token = 2 * config.num_kv_heads * config.head_dim * config.num_layers
    assert base.floor_bytes == 4 * (weights + 4 * 96 * token)
    ranks = 2 * (4 + 8)
    widths = sum(sum(config.target_shape(t)) for t in ("q_proj", "down_proj"))
    assert mixed.floor_bytes - base.floor_bytes == 4 * ranks * widths * config.num_layers
    pages = [page for s in mixed.segments for page in (*s.pages, *s.adapter.pages)]
    assert len(pages) == len(set(pages)) and 0 not in pages
