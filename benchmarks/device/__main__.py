"""See the package."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import benchmarks.device

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(benchmarks.device.MEMORY_SHARE))  # before jax is imported

from benchmarks.device import gpu, program_cache, runner, supervisor
from benchmarks.device.calls import CALL_SECONDS, CALLS, PACK_SECONDS, SECTIONS, plan
from benchmarks.device.report import Report
from benchmarks.device.scale import FULL, SMALL


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    found = Parser(
        prog="python -m benchmarks.device",
        description=benchmarks.device.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--plan", action="store_true", help="print the three calls and end")
    found.add_argument("--call", type=int, metavar="N", help="run one of the plan's calls")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for results")
    found.add_argument("--cache", type=Path, metavar="DIR", action="append", default=[], help="folder of an earlier call")
    found.add_argument("--sections", help="comma-separated, instead of --call; default: all")
    found.add_argument("--small", action="store_true", help="a tiny model; a machine without a GPU runs that anyway")
    found.add_argument("--budget", type=float, help=f"seconds; default: {CALL_SECONDS:.0f}")
    found.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # runs the sections here, until this time
    found.add_argument("--report", help=argparse.SUPPRESS)
    return found


def main() -> int:
    begin = time.time()
    args = (parse := parser()).parse_args()
    if args.plan:
        print(plan())
        return 0
    sections = args.sections.split(",") if args.sections else list(SECTIONS)
    unknown = [section for section in sections if section not in SECTIONS]
    seconds = args.budget if args.budget is not None else CALL_SECONDS
    if args.call is not None and not 1 <= args.call <= len(CALLS):
        parse.error(f"--call is {args.call}; allowed: 1 to {len(CALLS)}")
    if args.call is not None and args.sections:
        parse.error("--call and --sections exclude each other")
    if unknown:
        parse.error(f"--sections has {', '.join(unknown)}; allowed: {', '.join(SECTIONS)}")
    if not PACK_SECONDS < seconds <= 24 * 3600:
        parse.error(f"--budget is {seconds:g}; allowed: more than {PACK_SECONDS:.0f} seconds, at most a day")
    if args.out is None:
        parse.error("--out is missing; it names the folder for results")
    for folder in args.cache:
        if folder.exists() and not folder.is_dir():
            parse.error(f"--cache is {folder}, which is not a folder")
    if args.worker is not None:
        return _work(sections, args)
    small = args.small or not gpu.is_there()
    if not small and (lack := gpu.lack_of_memory(FULL)):
        parse.error(lack)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parse.error(f"--out cannot be made: {error}")
    if not os.access(args.out, os.W_OK | os.X_OK):
        parse.error(f"--out is {args.out}, which cannot be written to")
    for folder in args.cache:  # of little weight: what is missing is compiled
        if not program_cache.archives(folder):
            print(f"--cache {folder} has no archives of programs; they are compiled anew", file=sys.stderr, flush=True)
    if args.call is not None:
        request = supervisor.call_of(args.call, args.out, begin, small, min(seconds, CALL_SECONDS))
    else:
        request = supervisor.sections_of(sections, args.out, begin, small, seconds)
    for number in (signal.SIGTERM, signal.SIGHUP):  # ended from outside: processes of the call end with it
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return supervisor.supervise(supervisor.with_programs_of(request, args.cache))


def _work(sections: list[str], args: argparse.Namespace) -> int:
    scale = SMALL if args.small else FULL
    try:
        runner.run_sections(sections, scale, Report(args.out, args.report, args.cache), args.worker)
    except runner.NoGpu as lack:
        print(lack, file=sys.stderr, flush=True)
        return supervisor.NO_GPU
    except runner.DeviceLost as lost:
        print(f"the device is lost after {lost}", flush=True)
        return supervisor.DEVICE_LOST
    return 0


def end(code: int) -> NoReturn:
    """Ends at once: a thread that hangs in a compiler would hold up an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = main()
    if "--worker" in sys.argv:
        end(code)
    sys.exit(code)
