"""Reports of the device benchmark: complete or not, figures of earlier calls, predictions beside measurements."""

from __future__ import annotations

import json

import pytest

from benchmarks.device import predictions
from benchmarks.device.report import Report
from benchmarks.device.scale import FULL
from benchmarks.device.sections import loads


@pytest.fixture
def out(tmp_path):
    return tmp_path


def test_a_report_is_not_complete_before_its_call_ends(out):
    report = Report(out, "call-1")
    report.update(planned=["decode"])
    report.expect("decode", ["a", "b"])
    report.end("decode", "a", [])
    assert json.loads((out / "call-1.json").read_text())["complete"] is False
    assert "missing: decode: b" in (out / "call-1.md").read_text()
    report.end("decode", "b", [])
    report.close(1.0)
    assert Report(out, "call-1").content["complete"] is True


@pytest.mark.parametrize("boot", ["this", "another"])
def test_figures_of_an_earlier_call_on_the_same_machine(out, boot):
    earlier = Report(out, "call-1")
    earlier.update(boot="this", ceilings={"copy": 1.0, "matrix": 2.0, "link": 3.0})
    earlier.end("decode", "a", [{"ms": 1.0}])
    (out / "call-9.json").write_text("{ half")
    later = Report(out, "call-2")
    later.update(boot=boot)
    later.adopt_ceilings()
    assert (later.ceilings is not None) == (boot == "this")
    assert later.rows("decode") == [{"ms": 1.0}] * (boot == "this")
    assert later.content["sections"] == {}
    assert (later.content.get("ceilings from") == "call-1.json") == (boot == "this")


def test_figures_of_an_earlier_call_in_another_folder(out, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("earlier")
    earlier = Report(elsewhere, "call-1")
    earlier.update(boot="this", ceilings={"copy": 1.0, "matrix": 2.0, "link": 3.0})
    earlier.end("decode", "a", [{"ms": 1.0}])
    later = Report(out, "call-1", [elsewhere])
    later.update(boot="this")
    later.adopt_ceilings()
    assert later.ceilings == earlier.ceilings and later.rows("decode") == [{"ms": 1.0}]


def test_tables_have_predictions_beside_measurements(out):
    report = Report(out)
    for kind, ms in ((predictions.H100, 8.9), (predictions.H200, 6.4), ("NVIDIA A100", None)):
        assert predictions.decode_ms(kind, 32, 512, "base") == ms
    assert predictions.decode_ms(predictions.H100, 32, 2048, "base") is None
    assert predictions.prefill_ms(predictions.H100, "1 prompt of 2048", "base") == 48.0
    report.end("decode", "a", [{"ms": 8.9, **predictions.beside(8.9, 8.9)}, {"ms": 17.8, **predictions.beside(8.9, 17.8)}])
    report.end("decode", "b", [{"ms": 5.0, **predictions.beside(None, 5.0)}])
    assert "2 steps: 100.0 to 200.0 % of the predicted time, median 150.0 %" in report.text().split("## decode")[0]
    assert "| 5.0 |  |  |" in report.text()


def test_predictions_are_for_rows_that_are_measured():
    mixes = {mix.name for mix in FULL.mixes}
    for device in predictions.DECODE_MS.values():
        assert all(rows in FULL.rows and mix in mixes for rows, mix in device)
    assert set(predictions.LOADED_GB_PER_S) == {loads.rows_meanwhile(FULL)}
    assert predictions.CONTEXT in FULL.contexts and FULL.prompt_tokens == predictions.PREFILL_TOKENS
