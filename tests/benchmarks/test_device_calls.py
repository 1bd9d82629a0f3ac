"""The three calls of the device benchmark: what the plan holds, that they end in time, and what bad input is told."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.device import __main__ as command
from benchmarks.device import calls, gpu, processes, runner, supervisor
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report
from benchmarks.device.scale import FULL, SMALL

MINUTE = 60.0


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def request_of(out, *sections, seconds=MINUTE):
    """A group for each section, none of which may take longer than all together."""
    now = time.time()
    groups = tuple((calls.Group((section,), 0.0, seconds), now + seconds) for section in sections)
    return supervisor.Request("call-1", "a test", groups, now + seconds, out, True, out.parent / "live")


def with_worker(monkeypatch, script):
    """Processes run `script`, which has the report, the sections and a counter of starts, instead of a worker."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom benchmarks.device.report import Report\n"
    head += "out = Path(sys.argv[1])\nreport, section = Report(out, 'call-1'), sys.argv[2]\n"
    head += "starts = out / f'{section}.starts'\nstarts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')\n"
    head += "start = len(starts.read_text())\n"

    def worker(sections, request, deadline):
        return [sys.executable, "-c", head + script, str(request.out), sections[0]]

    monkeypatch.setattr(supervisor, "worker_command", worker)


# -- the plan -----------------------------------------------------------------------------------------------------------


def test_calls_cover_every_section_once_within_their_limits():
    modules = {
        file.stem
        for file in Path(runner.__file__).parent.glob("*.py")
        if "\ndef cases(scale: Scale, report" in file.read_text()
    }
    assert sorted(calls.SECTIONS) == sorted({*modules - {"correct_steps"}, "peers"})
    for groups in calls.CALLS:
        assert sum(group.limit_s for group in groups) + calls.PACK_SECONDS == calls.CALL_SECONDS
        assert all(group.expected_s <= group.limit_s for group in groups)
    order = calls.SECTIONS
    assert order[0] == "smoke" and order.index("peers") > max(order.index("decode"), order.index("prefill"))


def test_the_plan_names_sections_and_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["device", "--plan"])
    assert command.main() == 0
    told = capsys.readouterr().out
    assert all(section in told for section in calls.SECTIONS)
    for number in (1, 2, 3):
        words = calls.command(number).split()[3:]
        assert calls.command(number) in told and command.parser().parse_args(words).call == number


def test_a_group_may_use_what_earlier_ones_left():
    groups = supervisor.call_of(1, Path("out"), 1000.0).groups
    assert [end for _, end in groups] == calls.deadlines(calls.CALLS[0], 1000.0)
    assert groups[-1][1] == 1000.0 + calls.CALL_SECONDS - calls.PACK_SECONDS
    shorter = supervisor.call_of(1, Path("out"), 1000.0, seconds=100.0)
    assert shorter.groups[-1][1] == 1080.0


# -- what ends in time --------------------------------------------------------------------------------------------------


def test_a_case_that_hangs_costs_its_own_limit(out, monkeypatch):
    script = """
report.expect(section, ["hangs", "good"])
if start == 1:
    report.begin(section, "hangs", 0.5)
    time.sleep(600)
report.end(section, "good", [{"x": 1}])
os._exit(0)
"""
    with_worker(monkeypatch, script)
    assert supervisor.supervise(request_of(out, "decode")) == 1
    report = Report(out, "call-1")
    assert report.failures == ["decode: hangs"] and report.rows("decode") == [{"x": 1}]
    assert "killed after 0 s" in report.content["sections"]["decode"]["hangs"]["error"]
    assert report.content["complete"] and not report.missing


def test_a_process_that_dies_costs_the_case_that_it_was_doing(out, monkeypatch):
    script = """
report.expect(section, ["dies", "good"])
if start == 1:
    report.begin(section, "dies", 60)
    report.add(section, "dies", {"x": 0})
    print("Segmentation fault", file=sys.stderr)
    os.abort()
report.end(section, "good", [{"x": 1}])
"""
    with_worker(monkeypatch, script)
    assert supervisor.supervise(request_of(out, "decode")) == 1
    report = Report(out, "call-1")
    assert report.failures == ["decode: dies"] and report.rows("decode") == [{"x": 0}, {"x": 1}]  # rows that it had are kept
    assert "Segmentation fault (exit code -6)" in report.text()


def test_a_process_that_dies_before_its_first_case_is_told_and_others_go_on(out, monkeypatch):
    with_worker(monkeypatch, "if section == 'decode':\n    sys.exit('no such module')\nreport.end(section, 'good', [])")
    assert supervisor.supervise(request_of(out, "decode", "prefill")) == 1
    report = Report(out, "call-1")
    assert report.failures == ["decode: process"] and report.has("prefill", "good")
    assert "no such module (exit code 1)" in report.text()


def test_the_deadline_leaves_a_valid_report(out, monkeypatch):
    script = """
report.expect(section, ["first", "long", "never"])
report.end(section, "first", [{"x": 1}])
report.begin(section, "long", 600)
report.add(section, "long", {"x": 2})
time.sleep(600)
"""
    with_worker(monkeypatch, script)
    begin = time.monotonic()
    assert supervisor.supervise(request_of(out, "decode", "prefill", seconds=3.0)) == 0
    assert time.monotonic() - begin < MINUTE  # and not ten minutes
    content = json.loads((out / "call-1.json").read_text())
    report = Report(out, "call-1")
    assert not content["complete"] and "doing" not in content
    assert report.rows("decode") == [{"x": 1}, {"x": 2}]
    assert report.missing == ["decode: long", "decode: never", "prefill: all"]
    assert "missing: decode: long; never" in report.text()
    assert not list(out.glob("*.partial"))


def test_everything_that_a_process_started_ends_with_it(tmp_path):
    """A child in a session of its own, and one whose parent has ended."""
    child = "import time; time.sleep(600)"
    quiet = "start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    between = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}], {quiet}).pid)"
    script = f"""
import subprocess, sys, time
a = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
b = subprocess.run([sys.executable, "-c", {between!r}], capture_output=True, text=True).stdout.strip()
open({str(tmp_path / "pids")!r}, "w").write(f"{{a.pid}} {{b}}\\n")
time.sleep(600)
"""
    pids, end = tmp_path / "pids", time.monotonic() + MINUTE

    def started():
        return "enough" if pids.is_file() and pids.read_text().endswith("\n") else "too long" * (time.monotonic() > end)

    ending, _ = processes.run([sys.executable, "-c", script], os.environ, started)
    assert ending == "enough"
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_a_program_that_does_not_compile_costs_its_own_case(out, monkeypatch):
    report, threads = Report(out), []
    jobs = {"bad": lambda: 1 / 0, "good": lambda: None}
    compilation = Compilation(report, "decode", jobs, lambda: threads.append(threading.current_thread()))
    monkeypatch.setattr(runner, "cases_of", lambda *_: compilation.cases)
    report.update(ceilings={"copy": 1.0, "matrix": 1.0, "link": 1.0})
    runner.run_sections(["decode"], SMALL, report, time.time() + MINUTE)
    assert compilation.failed("bad") and not compilation.failed("good")
    assert threads == [threading.current_thread()]
    assert [row["program"] for row in report.rows("decode")] == ["good"]


def test_after_a_program_that_hung_only_the_rest_is_compiled(out):
    report, compiled = Report(out), []
    report.fail("decode", "compile, hung", "killed after 100 s")
    jobs = {name: lambda name=name: compiled.append(name) for name in ("hung", "a", "b")}
    compilation = Compilation(report, "decode", jobs, lambda: None)
    for case in compilation.cases[1:]:
        list(case.run())
    assert compiled == ["a", "b"]  # one by one, in order


# -- results ------------------------------------------------------------------------------------------------------------


def test_a_call_replaces_its_own_report_and_no_other(out, monkeypatch):
    with_worker(monkeypatch, "report.end(section, f'start {start}', [])")
    (out / "call-2.json").write_text("another's")
    (out / "call-1-programs-3.zip").write_bytes(b"old")
    supervisor.supervise(request_of(out, "decode"))
    supervisor.supervise(request_of(out, "decode"))
    assert list(Report(out, "call-1").content["sections"]["decode"]) == ["start 2"]
    assert (out / "call-2.json").read_text() == "another's"
    assert not (out / "call-1-programs-3.zip").exists()


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


def test_tables_have_predictions_beside_measurements(out):
    from benchmarks.device import predictions

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
    from benchmarks.device import predictions

    mixes = {mix.name for mix in FULL.mixes}
    for device in predictions.DECODE_MS.values():
        assert all(rows in FULL.rows and mix in mixes for rows, mix in device)
    assert predictions.CONTEXT in FULL.contexts and FULL.prompt_tokens == predictions.PREFILL_TOKENS


# -- bad input ----------------------------------------------------------------------------------------------------------

BAD = {
    "--call 4 --out {new}": "--call is 4; allowed: 1 to 3",
    "--call 0 --out {new}": "--call is 0; allowed: 1 to 3",
    "--call one --out {new}": "argument --call: invalid int value: 'one'",
    "--call 1": "--out is missing",
    "--sections decode": "--out is missing",
    "--call 1 --out {file}": "--out cannot be made",
    "--call 1 --out {file}/below": "--out cannot be made",
    "--call 1 --out {new} --cache {file}": "which is not a folder",
    "--call 1 --out {new} --cache {absent}": "which is not a folder",
    "--call 1 --sections decode --out {new}": "exclude each other",
    "--sections decode,nonsense --out {new}": "--sections has nonsense; allowed: smoke",
    "--call 1 --out {new} --budget 1": "--budget is 1; allowed: more than 20 seconds",
    "--call 1 --out {new} --budget nan": "--budget is nan; allowed",
    "--call 1 --out {new} --nonsense": "unrecognized arguments: --nonsense",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "is_there", lambda: False)
    monkeypatch.setattr(supervisor, "supervise", lambda request: pytest.fail("it was run"))
    paths = {name: tmp_path / name for name in ("file", "new", "absent")}
    monkeypatch.setattr(sys, "argv", ["device", *words.format(**paths).split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and BAD[words] in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("free_mib", "small", "starts"), [(24_000, False, False), (24_000, True, True), (81_000, False, True)])
def test_a_gpu_with_too_little_memory(tmp_path, monkeypatch, capsys, free_mib, small, starts):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(f'#!/bin/sh\ncase "$*" in *memory.free*) echo {free_mib};; *) echo "NVIDIA X, 1.0";; esac\n')
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["device", "--call", "1", "--out", str(tmp_path / "new"), *["--small"] * small])
    monkeypatch.setattr(supervisor, "supervise", lambda request: 7)
    if starts:
        assert command.main() == 7
        return
    with pytest.raises(SystemExit) as ended:
        command.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert "has 23.4 GiB free" in told and "12.6 for weights" in told
    assert not (tmp_path / "new").exists()


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexec sleep 600\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("benchmarks.machine.DRIVER_SECONDS", 0.2)
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    assert gpu.gpu_name() is None and gpu.free_bytes() is None


# -- all of it ----------------------------------------------------------------------------------------------------------

CHEAP = {
    "smoke": ("decode with LoRA",),
    "machine": ("device", "memory", "matrices", "link"),
    "correctness": ("paged_attention, decode, heads grouped, float32", "write_kv, float32", "sampling, tokens"),
    "decode": ("engine", "4 rows, 96 tokens, base", "4 rows, 96 tokens, mixed ranks, all seven", "scratch"),
    "prefill": ("4 prompts of 16, mixed ranks, all seven",),
    "loads": ("rank 16", "steps of 4 rows meanwhile"),
    "host": ("parts of a step, mixed ranks, q k v o", "the loop, mixed ranks, q k v o"),
    "ops": ("attention, 4 rows, 96 tokens", "adapters, 4 rows, mixed ranks, all seven", "write_kv"),
    "serve_curve": ("two systems at two loads",),
    "variants": ("as it is",),
}
"""Sections and those of their cases that take a second or a few."""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_calls_in_small(number, out, tmp_path, monkeypatch):
    """Every group in this process, by its cheap cases."""
    monkeypatch.setattr("benchmarks.device.timing.TARGET_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.device.loads.STEPS", 20)
    cases_of = runner.cases_of

    def cheap(section, scale, report, deadline):
        if section not in CHEAP:
            return [Case("nothing", lambda: [{"x": 1}])]
        cases = {case.name: case for case in cases_of(section, scale, report, deadline)}
        return [cases[name] for name in CHEAP[section]]

    def here(sections, request, deadline):
        runner.run_sections(sections, SMALL, Report(request.out, request.name), deadline)
        return processes.exit_code(0), ""

    monkeypatch.setattr(runner, "cases_of", cheap)
    monkeypatch.setattr(supervisor, "_run_process", here)
    request = dataclasses.replace(supervisor.call_of(number, out, time.time(), small=True), cache=tmp_path / "live")
    assert supervisor.supervise(request) == 0
    report = Report(out, f"call-{number}")
    assert report.content["complete"] and not report.failures and not report.missing
    assert not any("skipped" in row for section in report.content["sections"] for row in report.rows(section))
    for group in calls.CALLS[number - 1]:
        for section in group.sections:
            assert report.rows(section) and f"## {section}" in (out / f"call-{number}.md").read_text()


def test_every_section_has_cases_with_names_and_limits_of_their_own(out):
    report = Report(out)
    for section in calls.SECTIONS:
        for scale in (SMALL, FULL):
            cases = runner.cases_of(section, scale, report, 0.0)
            names = [case.name for case in cases]
            assert names and len(names) == len(set(names))
            assert all(0 < case.limit_s <= calls.CALL_SECONDS for case in cases)
