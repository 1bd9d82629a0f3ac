"""Supervisor of a call: a process for each group of sections, and another if one dies or hangs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import MEMORY_SHARE, gpu, processes, program_cache
from benchmarks.device.calls import CALL_SECONDS, CALLS, GROUPS, PACK_SECONDS, Group, deadlines
from benchmarks.device.report import TIME_WAS_UP, Report, last_line
from benchmarks.device.runner import OTHERS_DEVICE, START_SECONDS
from benchmarks.machine import describe

DEVICE_LOST = 3
"""Exit code of a process that lost its device."""
NO_GPU = 4
"""Exit code of a process that had no GPU for the full model."""
RETRY_SECONDS = 3.0
"""Pause after a process that died before its first case."""
KILLED_SECONDS = 1.0
"""Programs written this long before a process died are compiled again."""
PROCESS = "process"
"""Case of a process before its first own case."""
MAX_RESTARTS = 8
"""Most restarts of a group; more mean that something is wrong with all of it."""
OWN_CACHE = ("startup",)
"""Sections that time compiling, each start in a cache of its own."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Sections to run, their folder, and their limits in seconds.

    Attributes:
        name: File name of the report, without its ending.
        groups: Groups in order, each with the time (`time.time()`) at which it is cut off.
        end: Time at which everything has ended.
        small: Whether the tiny model is run.
        cache: Folder of the compiled programs.
        earlier: Folders with archives of programs, and with reports.
        free: Free bytes of the GPU's memory when the call began. None if unknown.
    """

    name: str
    command: str
    groups: tuple[tuple[Group, float], ...]
    end: float
    out: Path
    small: bool = False
    cache: Path = program_cache.LIVE
    earlier: tuple[Path, ...] = ()
    free: int | None = None


def call_of(number: int, out: Path, begin: float, small: bool = False, seconds: float = CALL_SECONDS) -> Request:
    """Request for one of the plan's calls."""
    last = begin + seconds - PACK_SECONDS
    groups = tuple((group, min(end, last)) for group, end in zip(CALLS[number - 1], deadlines(CALLS[number - 1], begin)))
    command = f"python -m benchmarks device --call {number}" + " --small" * small
    return Request(f"call-{number}", command, groups, begin + seconds, out, small)


def sections_of(sections: Sequence[str], out: Path, begin: float, small: bool, seconds: float) -> Request:
    """Request for chosen sections, in the plan's order and groups; each may take all remaining time."""
    last = begin + max(seconds - PACK_SECONDS, seconds / 2)
    chosen = [tuple(section for section in group.sections if section in sections) for group in GROUPS]
    groups = tuple((Group(names, 0.0, seconds), last) for names in chosen if names)
    command = f"python -m benchmarks device --sections {','.join(sections)} --budget {seconds:g}" + " --small" * small
    return Request("device", command, groups, begin + seconds, out, small)


def with_programs_of(request: Request, folders: Sequence[Path]) -> Request:
    """Request that first unpacks the archives in `folders`."""
    return dataclasses.replace(request, earlier=tuple(folders))


def supervise(request: Request) -> int:
    """Run the groups, print the report, and return 1 if anything failed or is missing, or nothing was measured."""
    begin = time.time()
    request.cache.mkdir(parents=True, exist_ok=True)
    taken = sum(program_cache.unpack(request.cache, folder) for folder in request.earlier)
    before = program_cache.entries(request.cache)
    _remove_old(request)
    report = Report(request.out, request.name, request.earlier)
    planned = [section for group, _ in request.groups for section in group.sections]
    report.update(**describe(request.command), planned=planned, boot=_boot())
    report.update(programs=f"{len(before)} were there, {taken} of them from archives")
    report.adopt_ceilings()
    if not request.small:
        request = dataclasses.replace(request, free=gpu.free_bytes())
    goes_on = _has_gpu(request)
    for group, deadline in request.groups:
        if goes_on and time.time() < deadline:
            goes_on = _run_group(group.sections, request, deadline)
            _print_failures(request, group)
        _pack(request, before)
        if not goes_on:
            break
    report = Report(request.out, request.name)
    report.close(time.time() - begin)
    print(report.text())
    return 0 if report.content["complete"] and report.measured and not report.failures else 1


def _has_gpu(request: Request) -> bool:
    """Ask for a GPU, unless the first sections find out themselves: children of the others take the device."""
    sections = request.groups[0][0].sections
    if request.small or not set(sections) <= set(OTHERS_DEVICE) - {"peers"} or gpu.jax_has_it():
        return True
    lack = "JAX has no GPU. --small runs a tiny model"
    Report(request.out, request.name).fail(sections[0], PROCESS, lack)
    print(f"the call ends: {lack}", file=sys.stderr, flush=True)
    return False


def _remove_old(request: Request) -> None:
    """Remove an earlier report of the same call, and its archives, which are unpacked if they are to be used."""
    old = [request.out / f"{request.name}.{ending}" for ending in ("json", "md", "partial")]
    for file in [*old, *request.out.glob(f"{request.name}-programs-*.*")]:
        file.unlink(missing_ok=True)


def _boot() -> str:
    """Name of the machine since it was started; its figures are compared with no other's."""
    file = Path("/proc/sys/kernel/random/boot_id")
    told = file.read_text() if file.is_file() else str(os.uname())
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _pack(request: Request, before: dict[str, int]) -> None:
    """Pack the programs, after each group, so that a call that is ended from outside has left them."""
    try:
        packed, left_out = program_cache.pack(request.cache, request.out, request.name, before)
    except OSError as error:
        print(f"programs are not packed: {error}", file=sys.stderr, flush=True)
        return
    told = f"{packed} packed" + f", {left_out} left out for want of room" * (left_out > 0)
    Report(request.out, request.name).update(**{"programs at the end": told})


def _print_failures(request: Request, group: Group) -> None:
    report = Report(request.out, request.name)
    for failure in report.failures:
        if failure.split(":")[0] in group.sections:
            print(f"NOT IN ORDER: {failure}", flush=True)


def _run_group(sections: Sequence[str], request: Request, deadline: float) -> bool:
    """Run a group, and return whether the call goes on."""
    retried = False
    for _ in range(MAX_RESTARTS):
        ending, told = _run_process(sections, request, deadline)
        if ending == processes.exit_code(0):
            return True
        report = Report(request.out, request.name)
        doing = report.doing
        if ending == TIME_WAS_UP:
            if doing is not None:
                report.skip(doing[0], doing[1], TIME_WAS_UP)
            return True
        if ending == processes.exit_code(NO_GPU):
            report.fail(sections[0], PROCESS, told)
            print(f"the call ends: {last_line(told)}", file=sys.stderr, flush=True)
            return False
        told = f"{told} ({ending})" if told else ending
        if doing is not None and doing[1] != PROCESS:
            report.fail(doing[0], doing[1], told)
            print(f"  FAILED {doing[0]}: {doing[1]}: {last_line(told)}", flush=True)
        elif ending != processes.exit_code(DEVICE_LOST):
            if retried or not ending.startswith("exit code"):  # no sign that another process would get further
                report.fail(sections[0], PROCESS, told)
                return True
            retried = True
            print(f"again in {RETRY_SECONDS:.0f} s: {sections[0]}: {last_line(told)}", flush=True)
            time.sleep(RETRY_SECONDS)
    Report(request.out, request.name).fail(sections[0], "restarts", f"more than {MAX_RESTARTS}")
    return True


def _run_process(sections: Sequence[str], request: Request, deadline: float) -> tuple[str, str]:
    """Run a process, and return its ending and the end of its error output; see `processes.run`."""
    kept = {} if set(sections) & set(OWN_CACHE) else program_cache.environment(request.cache)
    gpu.wait_until_free(request.free)
    Report(request.out, request.name).begin(sections[0], PROCESS, START_SECONDS)
    command = worker_command(sections, request, deadline)
    noticed: list[float] = []

    def overdue() -> str:
        if why := _overdue(request, deadline):
            noticed.append(time.time())
        return why

    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY_SHARE)}
    ending, told = processes.run(command, memory | os.environ | kept, overdue)
    if ending not in (processes.exit_code(0), processes.exit_code(DEVICE_LOST)):
        program_cache.forget_since(request.cache, (noticed or [time.time()])[0] - KILLED_SECONDS)
    return ending, told


def worker_command(sections: Sequence[str], request: Request, deadline: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks", "device", "--out", str(request.out), "--report", request.name]
    command += [word for folder in request.earlier for word in ("--cache", str(folder))]
    return [*command, "--sections", ",".join(sections), "--worker", str(deadline), *["--small"] * request.small]


def _overdue(request: Request, deadline: float) -> str:
    """Reason why the process must not go on, empty if it may."""
    now = time.time()
    if now > deadline:
        return TIME_WAS_UP
    try:
        doing = json.loads((request.out / f"{request.name}.json").read_text()).get("doing")
    except (OSError, ValueError):
        return ""
    return f"killed after {doing[3]:.0f} s" if doing is not None and now - doing[2] > doing[3] else ""
