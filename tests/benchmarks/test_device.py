"""The device benchmark in its small form: its records, and that one case's trouble is its own."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time

import jax
import pytest

from benchmarks.device import runner, supervisor
from benchmarks.device.bench_engine import BenchEngine
from benchmarks.device.report import Case, Report, Skip
from benchmarks.device.scale import SMALL, Mix
from benchmarks.device.sections import variants
from benchmarks.device.workbench import shared
from chameleon_jax.models.ops import pallas_triton
from chameleon_jax.models.ops.batched_lora import triton as lora
from chameleon_jax.models.ops.paged_attention import triton as attention
from chameleon_jax.models.runtime.step_inputs import pack_step


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path)
    report.update(ceilings={"copy": 1.0, "matrix": 1.0, "link": 1.0})  # none is measured
    return report


def in_an_hour() -> float:
    return time.time() + 3600


def with_cases(monkeypatch, *cases: Case) -> None:
    monkeypatch.setattr(runner, "cases_of", lambda section, scale, report, deadline: list(cases))


def test_a_case_that_raises_is_recorded_and_the_rest_goes_on(report, monkeypatch, tmp_path):
    with_cases(monkeypatch, Case("bad", lambda: 1 / 0), Case("good", lambda: [{"x": 1}]), Case("off", lambda: [{"ok": False}]))
    runner.run_sections(["decode"], SMALL, report, in_an_hour())
    assert report.failures == ["decode: bad", "decode: off"]
    assert report.rows("decode") == [{"x": 1}, {"ok": False}]
    assert "ZeroDivisionError" in report.text()
    assert Report(tmp_path).content == report.content  # on disk as it is in memory


def test_a_case_that_cannot_be_measured_says_why_and_is_no_failure(report, monkeypatch):
    def measure():
        yield {"x": 1}
        raise Skip("no room")

    with_cases(monkeypatch, Case("large", measure), Case("good", lambda: [{"x": 2}]))
    runner.run_sections(["decode"], SMALL, report, in_an_hour())
    assert report.rows("decode") == [{"x": 1}, {"x": 2}] and not report.failures and not report.missing
    assert "large: skipped: no room" in report.text()


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


def test_the_command_writes_both_files(tmp_path):
    """The processes are those of a real call."""
    request = supervisor.sections_of(["machine"], tmp_path, time.time(), True, 60.0)
    assert supervisor.supervise(dataclasses.replace(request, cache=tmp_path / "live")) == 0
    report = Report(tmp_path)
    assert report.ceilings.keys() == {"copy", "read", "matrix", "link"} and report.content["complete"]
    assert "copy, bytes read and written" in (tmp_path / "device.md").read_text()
    assert (tmp_path / "device-programs-1.zip").is_file()


def test_no_variant_equals_the_code():
    """Each option exists in this jaxlib where it can be asked, and each constant is read from its module and differs."""
    assert len({v.name for v in (*variants.VARIANTS, *variants.TUNING)}) == len(variants.VARIANTS) + len(variants.TUNING)
    for variant in (*variants.VARIANTS, *variants.TUNING):
        assert variant.options or variant.constants
        for name, value in variant.constants:
            assert getattr(variant.module, name) != value, f"{variant.name} changes nothing"
            uses = re.findall(rf"(?<![\w.]){name}(?!\w)", inspect.getsource(variant.module))
            assert len(uses) > 1, f"{name} is not read"


def test_kernels_of_a_variant_are_translated_with_its_constants(monkeypatch):
    """Also where a kernel's body reads a constant that its key does not have."""
    monkeypatch.setattr(pallas_triton, "_translate", lambda kernel: {"programs": lora.SHRINK_PROGRAMS})
    kernel = pallas_triton.Kernel(print, (), num_warps=4, num_stages=3, name="reads_a_constant")
    with pallas_triton.fresh_codes():
        assert pallas_triton._code(kernel) == {"programs": lora.SHRINK_PROGRAMS}
        with variants.constant(lora, "", SHRINK_PROGRAMS=7).in_force():
            assert pallas_triton._code(kernel) == {"programs": 7}
        assert pallas_triton._code(kernel) == {"programs": lora.SHRINK_PROGRAMS} != {"programs": 7}


def test_a_variant_is_in_force_while_its_programs_are_compiled(monkeypatch):
    found = []
    prepare = BenchEngine.prepare
    monkeypatch.setattr(BenchEngine, "prepare", lambda *args: found.append(attention.DECODE_PROGRAMS) or prepare(*args))
    row = variants.measure(variants.workbench(SMALL), variants.constant(attention, "", DECODE_PROGRAMS=5))
    assert found == [5] and attention.DECODE_PROGRAMS != 5
    assert [name for name, value in row.items() if name.endswith("base: ms") and value]


@pytest.mark.parametrize(
    "variant", [v for v in (*variants.VARIANTS, *variants.TUNING) if v.options and v.exists], ids=lambda v: v.name
)
def test_options_are_known(variant):
    jax.jit(lambda x: x + 1).lower(1.0).compile(dict(variant.options))


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
    pages = [page for s in mixed.chunks for page in (*s.pages, *s.adapter.pages)]
    assert len(pages) == len(set(pages)) and 0 not in pages


def test_a_mixed_step_does_the_work_of_its_halves_and_reads_the_weights_once():
    bench, mix = shared(SMALL), Mix("two", (4, 8))
    rows, tokens = SMALL.mixed
    decode = bench.decode(rows, 96, mix)
    prompt = bench.prompts(1, tokens, 0, mix, beside=decode)
    both = bench.joined(decode, prompt)
    assert both.floor_bytes == decode.floor_bytes + prompt.floor_bytes - bench.weight_bytes
    pages = [page for s in both.chunks for page in (*s.pages, *s.adapter.pages)]
    assert len(pages) == len(set(pages)) and 0 not in pages
    assert [s.slot for s in both.chunks] == [row.slot for row in both.sampling_rows.values()] == list(range(rows + 1))
    assert list(both.sampling_rows) == list(range(rows + 1))
    program = pack_step(both.chunks, both.sampling_rows, bench.engine.buckets).program
    assert program.rows >= rows and program.tiles and rows + tokens <= program.tokens < SMALL.prompt_tokens + max(SMALL.rows)
