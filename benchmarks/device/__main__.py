"""See the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# before jax is imported: all of the memory but what the driver and the libraries need
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import benchmarks.device
from benchmarks.device import runner, supervisor
from benchmarks.device.report import Report
from benchmarks.device.scale import FULL, SMALL


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=benchmarks.device.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of device.json and device.md")
    parser.add_argument("--sections", default=",".join(runner.SECTIONS), help="comma-separated; default: all")
    parser.add_argument("--small", action="store_true", help="a tiny model; what a CPU gets anyway")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; what would start later is skipped")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # runs the sections here, until this time
    args = parser.parse_args()
    sections = args.sections.split(",")
    unknown = [section for section in sections if section not in runner.SECTIONS]
    if unknown:
        parser.error(f"--sections has {', '.join(unknown)}; allowed: {', '.join(runner.SECTIONS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker is None:
        return supervisor.supervise(sections, args.out, args.small, args.budget)
    try:
        runner.run_sections(sections, SMALL if args.small else FULL, Report(args.out), args.worker)
    except runner.DeviceLost as lost:
        print(f"the device is lost after {lost}", flush=True)
        return supervisor.DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
