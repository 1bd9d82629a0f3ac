"""The three calls of the device benchmark: plan, ends in time, reports, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.device import calls, command, gpu, processes, runner, sections, supervisor
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report
from benchmarks.device.scale import FULL, SMALL
from benchmarks.device.sections import smoke

MINUTE = 60.0


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def request_of(out, *sections, seconds=MINUTE):
    """Make a request with a group for each section, each with the time of all together."""
    now = time.time()
    groups = tuple((calls.Group((section,), 0.0, seconds), now + seconds) for section in sections)
    return supervisor.Request("call-1", "a test", groups, now + seconds, out, True, out.parent / "live")


def with_worker(monkeypatch, script):
    """Let processes run `script`, which has the report, the section and a counter of starts, instead of a worker."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom benchmarks.device.report import Report\n"
    head += "out = Path(sys.argv[1])\nreport, section = Report(out, 'call-1'), sys.argv[2]\n"
    head += "starts = out / f'{section}.starts'\nstarts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')\n"
    head += "start = len(starts.read_text())\n"

    def worker(sections, request, deadline):
        return [sys.executable, "-c", head + script, str(request.out), sections[0]]

    monkeypatch.setattr(supervisor, "worker_command", worker)


# -- the plan -----------------------------------------------------------------------------------------------------------


def test_calls_cover_every_section_once_within_their_limits():
    folder = Path(sections.__file__).parent
    found = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    modules = [file for file in found if "\ndef cases(scale: Scale, report: Report, deadline" in file.read_text()]
    assert sorted(calls.SECTIONS) == sorted(m.parent.name if m.stem == "__init__" else m.stem for m in modules)
    for groups in calls.CALLS:
        assert sum(group.limit_s for group in groups) + calls.PACK_SECONDS == calls.CALL_SECONDS
        assert all(group.expected_s <= group.limit_s for group in groups)
    order = calls.SECTIONS
    assert order[0] == "smoke" and order.index("peers") > max(order.index("decode"), order.index("prefill"))


def test_the_plan_names_sections_and_commands(monkeypatch, capsys):
    assert main(["device", "--plan"]) == 0
    told = capsys.readouterr().out
    assert all(section in told for section in calls.SECTIONS)
    ran = []
    monkeypatch.setattr(supervisor, "supervise", lambda request: ran.append(request.name) or 0)
    monkeypatch.setattr(command, "make_writable", lambda out: None)
    monkeypatch.setattr(gpu, "is_there", lambda: False)
    for number in (1, 2, 3):
        words = calls.command(number).split()
        assert words[:3] == ["python", "-m", "benchmarks"] and calls.command(number) in told
        assert main(words[3:]) == 0
    assert ran == ["call-1", "call-2", "call-3"]


def test_a_group_may_use_what_earlier_ones_left():
    groups = supervisor.call_of(1, Path("out"), 1000.0).groups
    assert [end for _, end in groups] == calls.deadlines(calls.CALLS[0], 1000.0)
    assert groups[-1][1] == 1000.0 + calls.CALL_SECONDS - calls.PACK_SECONDS
    shorter = supervisor.call_of(1, Path("out"), 1000.0, seconds=100.0)
    assert shorter.groups[-1][1] == 1080.0


# -- ends in time -------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0.0)
    with_worker(monkeypatch, "if section == 'decode':\n    sys.exit('no such module')\nreport.end(section, 'good', [])")
    assert supervisor.supervise(request_of(out, "decode", "prefill")) == 1
    report = Report(out, "call-1")
    assert report.failures == ["decode: process"] and report.has("prefill", "good")
    assert "no such module (exit code 1)" in report.text()
    assert (out / "decode.starts").read_text() == "xx"


def test_a_process_that_dies_once_before_its_first_case_costs_nothing(out, monkeypatch):
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0.0)
    with_worker(
        monkeypatch, "if start == 1:\n    os.abort()\nreport.end(section, 'a', [{'x': 1}])\nreport.expect(section, 'a')"
    )
    assert supervisor.supervise(request_of(out, "decode")) == 0


def test_a_call_ends_where_jax_has_no_gpu(out, monkeypatch, capsys):
    """The full model, and JAX on a CPU, in processes as in use."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    request = dataclasses.replace(request_of(out, "decode", "prefill", seconds=5 * MINUTE), small=False)
    begin = time.monotonic()
    assert supervisor.supervise(request) == 1
    assert time.monotonic() - begin < MINUTE
    report = Report(out, "call-1")
    assert report.failures == ["decode: process"] and "prefill: all" in report.missing
    assert capsys.readouterr().err == "the call ends: JAX has no GPU: its backend is 'cpu'. --small runs a tiny model\n"


def test_children_that_take_the_device_are_not_run_without_one(out, monkeypatch):
    monkeypatch.setattr(supervisor, "_run_process", lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr("benchmarks.device.gpu.jax_has_it", lambda: False)
    assert supervisor.supervise(dataclasses.replace(request_of(out, "startup"), small=False)) == 1


def test_a_call_that_measured_nothing_fails(out, monkeypatch):
    with_worker(monkeypatch, "report.expect(section, ['a'])\nreport.end(section, 'a', [{'skipped': 'no torch'}])")
    assert supervisor.supervise(request_of(out, "peers")) == 1


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
    assert supervisor.supervise(request_of(out, "decode", "prefill", seconds=3.0)) == 1
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


def test_a_process_whose_first_thread_has_ended_is_killed():
    """It is shown as a zombie, and its other thread holds the device."""
    script = """
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(600)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    stat, end = Path(f"/proc/{process.pid}/stat"), time.monotonic() + MINUTE
    while ") Z " not in stat.read_text():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    processes.kill_descendants(process, processes._children() - {process.pid})
    assert process.returncode == -signal.SIGKILL


def test_memory_of_the_process_before_is_waited_for(monkeypatch):
    free = iter([1 << 30, 1 << 30, 70 << 30])
    monkeypatch.setattr(gpu, "free_bytes", lambda: next(free))
    gpu.wait_until_free(70 << 30)
    assert next(free, None) is None
    gpu.wait_until_free(None)


def test_the_most_valuable_steps_come_first(out, monkeypatch):
    """Decode and prefill share a process. Programs are compiled in two rounds, and nothing is measured meanwhile."""
    report, order = Report(out), []
    report.update(ceilings={"copy": 1.0, "matrix": 1.0, "link": 1.0})
    monkeypatch.setattr(runner, "require_gpu", lambda *_: None)
    monkeypatch.setattr(runner, "_run", lambda section, case, *_: order.append(case.name))
    runner.run_sections(["decode", "prefill"], FULL, report, time.time() + MINUTE)
    firsts = [order.index(f"{rows} rows, 512 tokens, base") for rows in (32, 128, 1)]
    prompt = order.index("1 prompt of 2048, base")
    assert firsts == sorted(firsts) and firsts[-1] < prompt < order.index("8 rows, 512 tokens, base")
    assert order.index("64 rows, 512 tokens, base") < order.index("32 rows, 2048 tokens, base")
    rounds = ["c" if "ompile" in name else "m" for name in order[1:]]
    assert "".join(rounds).count("cm") == 2


def test_a_program_that_does_not_compile_costs_its_own_case(out, monkeypatch):
    report, threads = Report(out), []
    jobs = {"bad": lambda: 1 / 0, "good": lambda: None}
    compilation = Compilation(report, "decode", jobs, lambda: threads.append(threading.current_thread()))
    monkeypatch.setattr(runner, "cases_of", lambda *_: compilation.cases())
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
    for case in compilation.cases()[1:]:
        list(case.run())
    assert sorted(compiled) == ["a", "b"]


def test_a_call_replaces_its_own_report_and_no_other(out, monkeypatch):
    with_worker(monkeypatch, "report.end(section, f'start {start}', [])")
    (out / "call-2.json").write_text("another's")
    (out / "call-1-programs-3.zip").write_bytes(b"old")
    supervisor.supervise(request_of(out, "decode"))
    supervisor.supervise(request_of(out, "decode"))
    assert list(Report(out, "call-1").content["sections"]["decode"]) == ["start 2"]
    assert (out / "call-2.json").read_text() == "another's"
    assert not (out / "call-1-programs-3.zip").exists()


# -- all of it ----------------------------------------------------------------------------------------------------------

CHEAP = {
    "smoke": ("both with LoRA",),
    "machine": ("device", "memory", "matrices", "link"),
    "correctness": ("paged_attention, decode, heads grouped, float32", "write_kv, float32", "sampling, tokens"),
    "decode": ("engine", "4 rows, 96 tokens, base", "4 rows, 96 tokens, mixed ranks, all seven", "scratch"),
    "prefill": ("4 prompts of 16, mixed ranks, all seven",),
    "mixed": ("3 rows + 32 prompt tokens, mixed ranks, all seven",),
    "loads": ("rank 16", "steps of 4 rows meanwhile"),
    "host": ("parts of a step, mixed ranks, q k v o", "the loop, mixed ranks, q k v o"),
    "ops": ("attention, 4 rows, 96 tokens", "adapters, 4 rows, mixed ranks, all seven", "write_kv"),
    "serve_curve": ("two systems at two loads",),
    "variants": ("as it is",),
}
"""Cheap cases of each section, which take a few seconds."""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_calls_in_small(number, out, tmp_path, monkeypatch):
    """Every group in this process, by its cheap cases."""
    monkeypatch.setattr("benchmarks.device.timing.TARGET_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.device.sections.loads.STEPS", 20)
    # the first check compiles the programs of all
    monkeypatch.setattr(smoke, "CHECKS", {name: smoke.CHECKS[name] for name in CHEAP["smoke"]})
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
