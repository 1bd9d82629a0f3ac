"""Runs the sections' cases in this process: one that raises is recorded, the rest goes on."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Sequence

from benchmarks.device.report import Case, Report
from benchmarks.device.scale import Scale

GROUPS = (
    ("machine", "correctness"),
    ("decode", "ops", "prefill", "loads", "host"),
    ("variants",),
    ("startup",),
    ("peers",),
)
"""Sections that share a process, and with it an engine."""
SECTIONS = tuple(section for group in GROUPS for section in group)
OTHERS_DEVICE = ("startup", "peers")
"""Sections where JAX in this process must not take the device: processes of their own do, or torch."""


class DeviceLost(Exception):
    """After an error the device computes nothing any more; another process may go on."""


def run_sections(sections: Sequence[str], scale: Scale, report: Report, deadline: float) -> None:
    """Runs what the report does not have yet. Cases that would start after `deadline` (`time.time()`) are skipped.

    Raises:
        DeviceLost: with the case that lost it recorded.
    """
    for section in sections:
        try:
            report.begin(section, "start")
            cases = cases_of(section, scale, report, deadline)
        except Exception:
            report.fail(section, "start", _short(traceback.format_exc()))
            continue
        report.update(doing=None)
        for case in cases:
            if not report.has(section, case.name):
                _run(section, case, report, deadline)


def cases_of(section: str, scale: Scale, report: Report, deadline: float) -> list[Case]:
    return importlib.import_module(f"benchmarks.device.{section}").cases(scale, report, deadline)


def _run(section: str, case: Case, report: Report, deadline: float) -> None:
    if time.time() > deadline:
        report.skip(section, case.name, "the time was up")
        return
    print(f"{section}: {case.name}", flush=True)
    report.begin(section, case.name)
    try:
        report.end(section, case.name, case.run())
        return
    except Exception:  # whatever it is, it belongs to the case
        error = _short(traceback.format_exc())
    report.fail(section, case.name, error)
    print(f"  {error.strip().splitlines()[-1][:300]}", flush=True)
    if section not in OTHERS_DEVICE and not _device_works():
        raise DeviceLost(f"{section}: {case.name}")


def _device_works() -> bool:
    import jax.numpy as jnp

    try:
        return float(jnp.arange(8.0).sum()) == 28.0
    except Exception:
        return False


def _short(error: str, characters: int = 1500) -> str:
    """The end of a traceback, which says what went wrong, and its beginning where the message is long."""
    return error if len(error) <= characters else error[: characters // 3] + "\n[...]\n" + error[-2 * characters // 3 :]
