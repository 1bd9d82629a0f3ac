"""The section `peers` of the device benchmark, small and on the CPU; what needs torch is skipped where it is not installed."""

from __future__ import annotations

import dataclasses
import itertools
import types

import pytest

from benchmarks.device import peers
from benchmarks.device.report import Report
from benchmarks.device.scale import FULL, SMALL
from benchmarks.device.timing import Timing
from benchmarks.device.workbench import Workbench
from chameleon_jax.models.config import PRESETS

ROWS, CONTEXT = SMALL.rows[-1], SMALL.contexts[0]


@pytest.fixture
def report(tmp_path):
    """As if the sections before had run."""
    report = Report(tmp_path)
    report.update(ceilings={"copy": 1e10, "matrix": 1e11, "link": 1e9})
    base = {"rows": ROWS, "context": CONTEXT, "adapters": "base"}
    report.end("decode", "base", [{**base, "skipped": "the first was"}, {**base, "ms": 4.0, "device ms": 2.0}])
    return report


def rows_of(cases, name):
    return next(case for case in cases if case.name == name).run()


def test_without_torch_a_row_says_so(report, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    (case,) = peers.cases(SMALL, report, 0.0)
    assert case.run() == [{"peer": "torch", "skipped": "torch is not installed"}]


def test_rows_stand_beside_our_own(report):
    pytest.importorskip("torch")
    found = peers.Peers(SMALL, report)
    timing = Timing(0.008, 0.01, 0.001)
    measured = [
        types.SimpleNamespace(variant="graph", timing=timing, attention="flash", note=""),
        types.SimpleNamespace(variant="compiled", timing=None, attention="", note="no compiler"),
    ]
    found.__dict__["_torch"] = types.SimpleNamespace(decode=lambda rows, context: measured, prefill=lambda tokens: measured)
    graph, compiled = found.decode(ROWS, CONTEXT)
    assert (graph["ms"], graph["chameleon-jax ms"]) == (8.0, 4.0)
    assert (graph["ratio to chameleon-jax"], graph["ratio to its device ms"]) == (2.0, 4.0)
    assert compiled["skipped"] == "no compiler"
    assert found.prefill()[0]["chameleon-jax ms"] == "not measured"
    assert found.decode(ROWS, CONTEXT + 1)[0]["chameleon-jax ms"] == "not measured"
    assert "prefill" not in report.content["sections"]


def test_floor_is_that_of_the_section_decode(report):
    pytest.importorskip("torch")
    found, bench = peers.Peers(SMALL, report), Workbench(SMALL)
    adapters = bench.adapters(peers.MIX, 3, itertools.count(1), 1 << 30)
    assert len(adapters) == 3
    num_bytes = bench.weight_bytes + ROWS * CONTEXT * bench.token_bytes + bench.adapter_bytes(adapters)
    assert found._floor(ROWS, CONTEXT, 3) == pytest.approx(num_bytes / 1e10)


def test_mixed_adapters_are_a_mix_of_the_section_decode():
    assert peers.MIX in FULL.mixes


def test_a_large_model_needs_a_gpu(report):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (case,) = peers.cases(FULL, report, 0.0)
    assert case.run()[0]["skipped"] == "this torch finds no GPU"


def test_torch_model_is_right_and_is_timed(report):
    pytest.importorskip("torch")
    cases = peers.cases(SMALL, report, 0.0)
    first = rows_of(cases, "correctness")[0]
    assert first["ok"] is True and float(first["error"]) < 1e-4
    row = rows_of(cases, f"{ROWS} rows, {CONTEXT} tokens")[0]
    assert row["ms"] > 0 and row["ratio to chameleon-jax"] == pytest.approx(row["ms"] / 4.0, rel=1e-2, abs=1e-3)
    assert rows_of(cases, f"1 prompt of {SMALL.prompt_tokens}")[0]["ms"] > 0


def test_the_check_notices_a_wrong_model():
    torch = pytest.importorskip("torch")
    from benchmarks.device.peers import torch_check, torch_llama, torch_steps

    def backwards(qkv, cos, sin, *heads):
        return torch_llama.rotate(qkv, cos, -sin, *heads)

    wrong = dataclasses.replace(torch_llama.PLAIN, rotate=backwards)
    model = PRESETS["tiny"], torch.float32, torch.device("cpu"), torch_steps.TORCHS_CHOICE
    assert torch_check.largest_error(*model, wrong) > 100 * peers.LIMIT > 100 * torch_check.largest_error(*model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformers_with_mixed_adapters(report, monkeypatch):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    cases = [case for case in peers.cases(SMALL, report, 0.0) if case.name.startswith("transformers")]
    base, mixed = (case.run()[0] for case in cases)
    assert (base["peer"], mixed["peer"]) == ("transformers", "transformers + peft")
    assert mixed["adapters"] == peers.MIX.name and "4 adapters" in mixed["note"]
    assert mixed["floor ms"] > base["floor ms"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_row_gets_its_own_adapter():
    torch, _, _ = (pytest.importorskip(package) for package in ("torch", "transformers", "peft"))
    from benchmarks.device.peers.mixed_adapters import MixedAdapters

    adapters = MixedAdapters(SMALL, peers.MIX, 3)
    words = torch.arange(8).expand(3, 8)
    with torch.inference_mode():
        plain = adapters.base(input_ids=words).logits
        mixed = adapters.with_adapters()(input_ids=words, adapter_names=adapters.names).logits
    assert len({float(row.sum()) for row in plain}) == 1
    assert all((mixed[i] - other).abs().max() > 1e-3 for i, other in itertools.product((0, 1), (plain[0], mixed[2])))
    assert {p.dtype for p in adapters.base.parameters()} == {torch.float32}
