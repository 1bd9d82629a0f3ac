"""The section `peers` of the device benchmark, small and on the CPU; tests of torch are skipped if it is not installed."""

from __future__ import annotations

import dataclasses
import itertools
import types

import pytest

from benchmarks.device.report import Report
from benchmarks.device.scale import FULL, SMALL, Mix
from benchmarks.device.sections import peers
from benchmarks.device.timing import Timing
from benchmarks.device.workbench import Workbench
from chameleon_jax.models.config import PRESETS

ROWS, CONTEXT = SMALL.rows[-1], SMALL.contexts[0]
MIXED = SMALL.mixes[1]


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr("benchmarks.device.timing.TARGET_SECONDS", 0.01)


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
    for mix in SMALL.mixes:
        adapters = bench.adapters(mix, 3, itertools.count(1), 1 << 30)
        num_bytes = bench.weight_bytes + ROWS * CONTEXT * bench.token_bytes + bench.adapter_bytes(adapters)
        assert found._floor(ROWS, CONTEXT, len(adapters), mix) == pytest.approx(num_bytes / 1e10)


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
    from benchmarks.device.sections.peers import torch_check, torch_llama, torch_steps

    def backwards(qkv, cos, sin, *heads):
        return torch_llama.rotate(qkv, cos, -sin, *heads)

    wrong = dataclasses.replace(torch_llama.PLAIN, rotate=backwards)
    model = PRESETS["tiny"], torch.float32, torch.device("cpu"), torch_steps.TORCHS_CHOICE
    assert torch_check.largest_error(*model, wrong) > 100 * peers.LIMIT > 100 * torch_check.largest_error(*model)


def test_mixes_are_timed_beside_our_own(report):
    pytest.importorskip("torch")
    ours = {"rows": ROWS, "context": CONTEXT, "adapters": MIXED.name, "ms": 4.0, "device ms": 2.0, "note": "3 adapters"}
    report.end("decode", "mix", [ours])
    cases = peers.cases(SMALL, report, 0.0)
    in_order, copied = rows_of(cases, f"{ROWS} rows, {CONTEXT} tokens, {SMALL.mixes[3].name}")
    assert in_order["ms"] > 0 and copied["ms"] > 0
    assert sorted([in_order["note"], copied["note"]]) == ["", "fastest of 2"]
    in_order, copied = rows_of(cases, f"{ROWS} rows, {CONTEXT} tokens, {MIXED.name}")
    assert "not ordered" in in_order["skipped"]  # two rows share an adapter, as in our own step
    assert copied["chameleon-jax ms"] == 4.0 and copied["note"] == "3 adapters"
    prefill = rows_of(cases, f"1 prompt of {SMALL.prompt_tokens}, {peers.MIX.name}")
    assert [row["adapters"] for row in prefill] == [peers.MIX.name] and prefill[0]["ms"] > 0


def test_adapters_that_do_not_pass_their_check_are_not_timed(report):
    pytest.importorskip("torch")
    from benchmarks.device.sections.peers import torch_mixes

    report.end(
        "peers", peers.LORA_CHECK, [{"LoRA": torch_mixes.IN_ORDER, "ok": True}, {"LoRA": torch_mixes.IN_ORDER, "ok": False}]
    )
    (row,) = peers.Peers(SMALL, report).decode(ROWS, CONTEXT, MIXED)
    assert row["skipped"] == "no way to add adapters passed its check"


def test_copies_by_index_are_timed_only_without_a_kernel():
    pytest.importorskip("torch")
    from benchmarks.device.sections.peers.torch_mixes import BY_INDEX, IN_ORDER, TRITON, worth_timing

    assert worth_timing([IN_ORDER, BY_INDEX, TRITON]) == [IN_ORDER, TRITON]
    assert worth_timing([IN_ORDER, BY_INDEX]) == [IN_ORDER, BY_INDEX]


def test_kernels_are_left_out_after_a_process_died_in_their_check(report, monkeypatch):
    asked = []
    monkeypatch.setattr(peers, "check_lora", lambda kernels=True: asked.append(kernels) or [])
    assert peers.Peers(SMALL, report)._lora_rows == []
    report.fail("peers", peers.LORA_CHECK, "exit code -11")
    assert peers.Peers(SMALL, report)._lora_rows == []
    assert asked == [True, False]


def test_a_device_that_is_lost_in_the_check_ends_the_process(report, monkeypatch):
    monkeypatch.setattr(peers, "check_lora", lambda kernels=True: [])
    monkeypatch.setattr(peers, "torch_works", lambda: False)
    with pytest.raises(SystemExit, match="computes nothing"):
        peers.Peers(SMALL, report).check_lora()


def test_a_batch_that_does_not_fit_says_so(report):
    pytest.importorskip("torch")
    from benchmarks.device.sections.peers.torch_mixes import IN_ORDER, TorchMixes
    from benchmarks.device.sections.peers.torch_steps import lacking_text

    assert lacking_text(3 << 30, 5 << 30, 8 << 30) == ""
    assert lacking_text(3 << 30, 0, 2 << 30) == "KV takes 3.0 GiB; 2.0 GiB are free"
    text = lacking_text(3 << 30, 6 << 30, 8 << 30)
    assert text == "KV takes 3.0 GiB and adapters 6.0 GiB; 8.0 GiB are free"
    asked = []
    bench = types.SimpleNamespace(lacking=lambda *sizes: asked.append(sizes) or text)
    found = peers.Peers(SMALL, report)
    found.__dict__["_mixes"] = TorchMixes(SMALL, bench)
    found.__dict__["_lora_rows"] = [{"LoRA": IN_ORDER, "ok": True}]
    (row,) = found.decode(ROWS, CONTEXT, Mix("two ranks", (8, 17), ("o_proj",)))
    assert row["skipped"] == text and "ms" not in row
    o_elems = (16 + 32) * 2 * sum(SMALL.config.target_shape("o_proj")) * SMALL.config.num_layers
    assert asked == [(ROWS * CONTEXT, 4 * o_elems)]


def test_batches_have_as_many_adapters_as_our_own():
    assert peers.adapters_of(None, 128) == 128
    assert peers.adapters_of({"note": ""}, 128) == 128
    assert peers.adapters_of({"note": "85 adapters; ms is the host's"}, 128) == 85


def test_cases_come_in_order_of_importance(report, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [case.name for case in peers.cases(FULL, report, 0.0)]
    assert len(set(names)) == len(names)
    mixes = [f"{rows} rows, 512 tokens{mix}" for rows in (32, 128) for mix in ("", *(f", {m.name}" for m in FULL.mixes[1:]))]
    assert names[:11] == ["packages", "correctness", peers.LORA_CHECK, *mixes]
    assert names[11:13] == ["1 prompt of 2048", f"1 prompt of 2048, {peers.MIX.name}"]
    assert {f"{rows} rows, {context} tokens" for rows in FULL.rows for context in FULL.contexts} < set(names)
    assert names[-1].startswith("transformers")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformers_with_mixed_adapters(report, monkeypatch):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    monkeypatch.setattr("benchmarks.device.sections.peers.mixed_adapters.CALLS", 1)
    cases = [case for case in peers.cases(SMALL, report, 0.0) if case.name.startswith("transformers")]
    base, mixed = (case.run()[0] for case in cases)
    assert (base["peer"], mixed["peer"]) == ("transformers", "transformers + peft")
    assert mixed["adapters"] == peers.MIX.name and "4 adapters" in mixed["note"]
    assert mixed["floor ms"] > base["floor ms"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_row_gets_its_own_adapter():
    torch, _, _ = (pytest.importorskip(package) for package in ("torch", "transformers", "peft"))
    from benchmarks.device.sections.peers.mixed_adapters import MixedAdapters

    adapters = MixedAdapters(SMALL, peers.MIX, 3)
    words = torch.arange(8).expand(3, 8)
    with torch.inference_mode():
        plain = adapters.base(input_ids=words).logits
        mixed = adapters.with_adapters()(input_ids=words, adapter_names=adapters.names).logits
    assert len({float(row.sum()) for row in plain}) == 1
    assert all((mixed[i] - other).abs().max() > 1e-3 for i, other in itertools.product((0, 1), (plain[0], mixed[2])))
    assert {p.dtype for p in adapters.base.parameters()} == {torch.float32}
