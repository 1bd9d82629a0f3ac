"""Command line of the GPU benchmark; the package's docstring explains it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.device import calls, gpu, program_cache, runner, supervisor
from benchmarks.device.calls import CALL_SECONDS, CALLS, PACK_SECONDS, SECTIONS
from benchmarks.device.report import Report
from benchmarks.device.scale import FULL, SCALES


def main(
    plan: Annotated[bool, typer.Option("--plan", help="Print the commands of the three calls and exit.")] = False,
    call: Annotated[
        int | None, typer.Option(metavar="N", help=f"Number of the call to run, 1 to {len(CALLS)} (default: run --sections).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the results (no default; only --plan does without).")
    ] = None,
    cache: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Directory of an earlier call, for its programs and measured ceilings; repeat for several (default: none).",
        ),
    ] = None,
    sections: Annotated[
        str | None,
        typer.Option(help=f"Sections to run, comma-separated, without --call (default: all): {', '.join(SECTIONS)}."),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Measure a tiny model. A machine without a GPU always does.")] = False,
    budget: Annotated[float, typer.Option(help="Time that the call may take, seconds.")] = CALL_SECONDS,
    worker: Annotated[
        float | None, typer.Option(hidden=True, help="Run in this process until this Unix time, seconds (default: in workers).")
    ] = None,
    report: Annotated[str, typer.Option(hidden=True, help="Name of the JSON file of a worker.")] = "device",
) -> int:
    """Check and measure everything on one GPU, in three calls of ten minutes.

    The exit code is 0 if all was measured and no check failed.
    """
    begin = time.time()
    if plan:
        print(calls.plan())
        return 0
    names = sections.split(",") if sections else list(SECTIONS)
    folders = cache or []
    check(call, sections, names, budget, folders)
    if out is None:
        raise typer.BadParameter("--out is missing; it names the folder for results")
    if worker is not None:
        end(work(names, small, Report(out, report, folders), worker))
    small = small or not gpu.is_there()
    if not small and (lack := gpu.lack_of_memory(FULL)):
        raise typer.BadParameter(lack)
    make_writable(out)
    for folder in folders:  # a warning only: missing programs are compiled
        if not program_cache.archives(folder):
            print(f"--cache {folder} has no archives of programs; they are compiled anew", file=sys.stderr, flush=True)
    if call is not None:
        request = supervisor.call_of(call, out, begin, small, min(budget, CALL_SECONDS))
    else:
        request = supervisor.sections_of(names, out, begin, small, budget)
    for number in (signal.SIGTERM, signal.SIGHUP):  # processes of the call end with it
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return supervisor.supervise(supervisor.with_programs_of(request, folders))


def check(call: int | None, sections: str | None, names: list[str], budget: float, folders: list[Path]) -> None:
    """Check the options.

    Raises:
        BadParameter: An option is wrong.
    """
    if call is not None and not 1 <= call <= len(CALLS):
        raise typer.BadParameter(f"--call is {call}; allowed: 1 to {len(CALLS)}")
    if call is not None and sections:
        raise typer.BadParameter("--call and --sections exclude each other")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise typer.BadParameter(f"--sections has {', '.join(unknown)}; allowed: {', '.join(SECTIONS)}")
    if not PACK_SECONDS < budget <= 24 * 3600:
        raise typer.BadParameter(f"--budget is {budget:g}; allowed: more than {PACK_SECONDS:.0f} seconds, at most a day")
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"--cache is {folder}, which is not a folder")


def make_writable(out: Path) -> None:
    """Make the folder for results.

    Raises:
        BadParameter: It cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out cannot be made: {error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"--out is {out}, which cannot be written to")


def work(sections: list[str], small: bool, report: Report, deadline: float) -> int:
    """Run sections in this process until `deadline` (`time.time()`), and return its exit code."""
    try:
        runner.run_sections(sections, SCALES["small" if small else "full"], report, deadline)
    except runner.NoGpu as lack:
        print(lack, file=sys.stderr, flush=True)
        return supervisor.NO_GPU
    except runner.DeviceLost as lost:
        print(f"the device is lost after {lost}", flush=True)
        return supervisor.DEVICE_LOST
    return 0


def end(code: int) -> NoReturn:
    """End the process at once: a thread that hangs in a compiler would hold up an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
