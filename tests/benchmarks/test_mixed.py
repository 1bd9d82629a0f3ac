"""Mixed traffic on a tiny model: a round has the lengths that were drawn, and a slower checkout is found to be slower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.serving import mixed
from benchmarks.serving.mixed import THIS, Worker, draw, figures, fill, medians, ratios, same_tokens
from benchmarks.serving.mixed_worker import serve
from tests import reference_models as reference

LENGTHS = ((20, 40), (8, 16))
SLOWER_S = 0.03
STUB = """
import json, pathlib, sys
import chameleon_jax

for line in sys.stdin:
    model = json.loads(line).get("model")
    assert model is None or pathlib.Path(model).is_dir()
    print(json.dumps({"package": chameleon_jax.__file__, "vocab_size": 256}), flush=True)
"""
"""Worker without an engine."""
SLOW = f"""

class ServingLoop(ServingLoop):
    def step(self, wait=True):
        time.sleep({SLOWER_S})
        return super().step(wait)
"""
"""End of a loop whose steps take longer."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("a", "b"):
        reference.save_adapter(folder / name, reference.CONFIGS["gqa"], 4, seed=ord(name))
    return folder


def test_a_round_has_the_lengths_that_were_drawn_and_mixed_steps(engines, text_model, adapters):
    requests = draw(20, ["a", "b"], 0.3, *LENGTHS, seed=1)
    assert {r["adapter"] for r in requests} == {"a", "b", None}
    with engines.borrow(text_model, max_num_seqs=4) as engine:
        for name in ("a", "b"):
            engine.add_lora(name, adapters / name)
        outcome = serve(engine, fill(requests, 256, seed=0), concurrency=4)
        counters = engine.loop.counters
        assert counters.steps == len(outcome["steps"]) and counters.decode_rows == sum(rows for *_, rows in outcome["steps"])
        assert counters.prefill_tokens == sum(tokens for _, tokens, _ in outcome["steps"])
    for request, times, output in zip(requests, outcome["times"], outcome["outputs"]):
        assert len(times) == len(output) == request["max_tokens"] and times == sorted(times)
    ends = sorted(times[-1] for times in outcome["times"])
    for i, arrival in enumerate(outcome["arrivals"][4:]):  # as one of four ends, and no step runs meanwhile
        assert ends[i] < arrival and not any(ends[i] < end < arrival for end, *_ in outcome["steps"])
    row = figures({**outcome, "compiled": 0}, requests, 4)
    assert 0 < row["with prompts and decodes"] < row["steps"] and 2 < row["rows decoded a step"] <= 4


def test_figures_of_a_round_that_is_known():
    requests = [{"prompt_len": n} for n in (10, 20, 30, 40)]
    times = [[1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 4.0, 6.0], [5.0, 7.0]]
    steps = [(1.0, 30, 0), (2.0, 0, 2), (3.0, 30, 1), (4.0, 0, 2), (5.0, 40, 1)]
    outcome = {"arrivals": [0.0, 0.0, 2.0, 3.5], "times": times, "steps": steps, "compiled": 0}
    assert figures(outcome, requests, 2) == {  # from 2.0, the first end, to 3.5, the last arrival
        "output tokens/s": 1.3,
        "all tokens/s": 21.3,
        "TBT P50, ms": 1000.0,
        "TBT P99, ms": 1000.0,
        "TTFT P50, ms": 1250.0,
        "TTFT P99, ms": 1495.0,
        "measured, s": 1.5,
        "steps": 1,
        "with prompts and decodes": 1,
        "rows decoded a step": 1.0,
        "compiled": 0,
    }


def test_rounds_with_compilations_do_not_count():
    def row(number, checkout, value, compiled):
        columns = ("output tokens/s", "all tokens/s", "TBT P50, ms", "TBT P99, ms", "TTFT P50, ms", "TTFT P99, ms")
        return {"round": number, "checkout": checkout, **dict.fromkeys(columns, value), "compiled": compiled}

    rows = [row(i, "this", value, 0) for i, value in enumerate((10.0, 30.0, 20.0))]
    rows += [row(i, "other", value, compiled) for i, (value, compiled) in enumerate(((1.0, 3), (10.0, 0), (10.0, 0)))]
    found = medians(rows)
    assert [(m["rounds"], m["output tokens/s"]) for m in found] == [(3, 20.0), (2, 10.0)]
    assert {(r["of medians"], r["of rounds"]) for r in ratios(rows, found)} == {("2.000", "3.000 2.000")}
    with pytest.raises(RuntimeError, match="every round of other"):
        medians([r for r in rows if r["checkout"] == "this" or r["compiled"]])


def test_tokens_that_differ_are_told():
    assert same_tokens([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 75.0


def test_a_slower_checkout_is_found_to_be_slower(text_model, adapters, tmp_path, capsys):
    shutil.copytree(THIS / "chameleon_jax", tmp_path / "other" / "chameleon_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "chameleon_jax" / "loop.py").open("a") as file:
        file.write(SLOW)
    options = f"--against {tmp_path / 'other'} --model {text_model} --adapter-dir {adapters} --out {tmp_path / 'result.json'} "
    options += "--rounds 2 --warm-ups 1 --requests 8 --concurrency 2 --prompt-len 16 16 --output-len 4 8 "
    options += "--base-share 1 --max-num-batched-tokens 32 --system fifo --compile-programs lazy"
    assert main(["mixed", *options.split()]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["commits"]["other"] == "unknown" and result["same_tokens_percent"] == [100.0, 100.0]
    rows = [row for row in result["table"] if "round" in row]
    assert [(row["round"], row["checkout"]) for row in rows] == [(0, "this"), (0, "other"), (1, "other"), (1, "this")]
    for row in rows:
        slow = row["checkout"] == "other"
        assert (row["TBT P50, ms"] > 1e3 * SLOWER_S) == (row["measured, s"] > SLOWER_S * row["steps"]) == slow, row
        assert 0 < row["with prompts and decodes"] <= row["steps"] and row["compiled"] == 0
    compared = {row["this / other"]: row for row in result["table"] if "this / other" in row}
    assert float(compared["output tokens/s"]["of medians"]) > 1.5 and float(compared["TBT P50, ms"]["of medians"]) < 0.7
    told = capsys.readouterr()
    assert "| this / other |" in told.out
    unmeasured = [line for line in told.err.splitlines() if line.startswith("{'round': -1")]
    assert len(unmeasured) == 2 and not any("'compiled': 0}" in line for line in unmeasured)


def test_a_worker_of_another_package_and_one_that_ends_are_reported(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(mixed, "WORKER", tmp_path / "stub.py")
    start = {"model": str(tmp_path)}
    with pytest.raises(RuntimeError, match=f"the worker of {tmp_path} runs .*chameleon_jax"):
        Worker(tmp_path, start)
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        Worker(THIS, {"model": str(tmp_path / "none")})
    worker = Worker(THIS, start)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        worker.ask({})
    worker.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--requests 31", "--requests is 31; allowed: 32 or more"),
        ("--compile-programs background", "allowed: ahead, lazy"),
        (f"--against {Path(__file__).parent}", "allowed: root of a checkout"),
    ],
)
def test_wrong_options_are_refused(words, message, capsys):
    assert main(["mixed", *words.split()]) == 2
    assert message in capsys.readouterr().err
