"""Starts a process for each group of sections, and another when one dies or hangs, which goes on with the next case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.report import Report
from benchmarks.device.runner import GROUPS
from benchmarks.machine import describe, gpu_name

STALL_SECONDS = 200.0
"""A case that takes longer hangs."""
GRACE_SECONDS = 30.0
"""What a case that runs when the budget ends may still take."""
DEVICE_LOST = 3
"""Exit code of a process whose device computes nothing any more."""
MAX_RESTARTS = 8
"""Of a group: more, and something is wrong with all of it."""


def supervise(sections: Sequence[str], out: Path, small: bool, budget: float) -> int:
    """Runs the sections and says what came of it; 1 where anything failed."""
    begin = time.time()
    for name in ("device.json", "device.md"):
        (out / name).unlink(missing_ok=True)
    small = small or not _gpu_is_there()
    command = f"python -m benchmarks.device --sections {','.join(sections)} --budget {budget:g}" + " --small" * small
    Report(out).update(**describe(command))
    for group in GROUPS:
        chosen = [section for section in group if section in sections]
        if time.time() > begin + budget:
            for section in chosen:
                Report(out).skip(section, "all", "the time was up")
        elif chosen:
            _run_group(chosen, out, small, begin + budget)
    report = Report(out)
    report.update(seconds=round(time.time() - begin, 1))
    print(report.text())
    return 1 if report.failures else 0


def _gpu_is_there() -> bool:
    """Without taking it."""
    if gpu_name() is not None:
        return True
    probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return "gpu" in subprocess.run(probe, capture_output=True, text=True, timeout=120).stdout


def _run_group(sections: list[str], out: Path, small: bool, deadline: float) -> None:
    for _ in range(MAX_RESTARTS):
        ended = _run_process(sections, out, small, deadline)
        if ended is None:
            return
        report = Report(out)
        if report.doing is not None:
            report.fail(*report.doing, ended)
        elif not ended.endswith(
            f"exit code {DEVICE_LOST}"
        ):  # it ended between cases: nothing says that another would get further
            report.fail(sections[0], "start", ended)
            return
    Report(out).fail(sections[0], "restarts", f"more than {MAX_RESTARTS}")


def _run_process(sections: list[str], out: Path, small: bool, deadline: float) -> str | None:
    """How the process ended, if not well."""
    command = [sys.executable, "-m", "benchmarks.device", "--out", str(out), "--sections", ",".join(sections)]
    command += ["--worker", str(deadline)] + ["--small"] * small
    with tempfile.TemporaryFile("w+") as errors:
        # a session of its own: what it started ends with it
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        why = ""
        try:
            while process.poll() is None and not why:
                time.sleep(0.2)
                why = _overdue(out, deadline)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        errors.seek(0)
        return None if code == 0 else f"{errors.read()[-1500:]}\n{why or f'exit code {code}'}"


def _overdue(out: Path, deadline: float) -> str:
    """Why the process must not go on; empty: it may."""
    try:
        doing = json.loads((out / "device.json").read_text()).get("doing")
    except (OSError, ValueError):
        return ""
    now = time.time()
    if doing is not None and now - doing[2] > STALL_SECONDS:
        return f"killed after {STALL_SECONDS:.0f} s"
    if now > deadline + GRACE_SECONDS:
        return "killed: the time was up"
    return ""
