"""Runner of the sections' cases in this process; a case that raises is recorded, and the rest goes on."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Sequence

from benchmarks.device.report import TIME_WAS_UP, Case, Report, Skip, last_line
from benchmarks.device.scale import FULL, Scale

OTHERS_DEVICE = ("startup", "peers", "serve_curve", "autotuning")
"""Sections for which JAX in this process must not take the device, because processes of their own or torch do."""
NEED_CEILINGS = ("decode", "prefill", "mixed", "loads", "ops")
START = "start"
START_SECONDS = 90.0
"""Limit for importing a section and listing its cases."""


class NoGpu(Exception):
    """No GPU for JAX to run the full model on."""


class DeviceLost(Exception):
    """Loss of the device, which computes nothing after an error; another process may go on."""


def run_sections(sections: Sequence[str], scale: Scale, report: Report, deadline: float) -> None:
    """Run the cases that the report lacks; cases that would start after `deadline` (`time.time()`) are skipped.

    Raises:
        NoGpu: Raised before any case.
        DeviceLost: A case, which is recorded, has lost the device.
    """
    require_gpu(sections, scale)
    found = []
    for section in sections:
        if report.failed(section, START):  # in the process before this one, which the section may have ended
            continue
        try:
            report.begin(section, START, START_SECONDS)
            cases = cases_of(section, scale, report, deadline)
        except Exception:
            report.fail(section, START, _short(traceback.format_exc()))
            continue
        report.expect(section, [case.name for case in cases])
        report.idle()
        found += [(section, case) for case in cases]
    for section, case in sorted(found, key=lambda f: f[1].priority):
        if report.has(section, case.name):
            continue
        if section in NEED_CEILINGS:
            _measure_ceilings(scale, report, deadline)
        _run(section, case, report, deadline)


def require_gpu(sections: Sequence[str], scale: Scale) -> None:
    """Require a GPU for the full model, which would take all of the call on a CPU and measure nothing of use.

    Raises:
        NoGpu: JAX has none.
    """
    if scale != FULL or set(sections) <= set(OTHERS_DEVICE):
        return
    import jax

    try:
        backend = jax.default_backend()
    except Exception as error:
        raise NoGpu(f"JAX has no GPU: {last_line(str(error))}") from None
    if backend != "gpu":
        raise NoGpu(f"JAX has no GPU: its backend is {backend!r}. --small runs a tiny model")


def cases_of(section: str, scale: Scale, report: Report, deadline: float) -> list[Case]:
    return importlib.import_module(f"benchmarks.device.sections.{section}").cases(scale, report, deadline)


def _measure_ceilings(scale: Scale, report: Report, deadline: float) -> None:
    """Measure the ceilings that neither the section `machine` nor an earlier call on the same machine has."""
    from benchmarks.device.sections import machine

    case = machine.ceilings_case(scale, report)
    if case is not None and not report.has("machine", case.name):
        _run("machine", case, report, deadline)


def _run(section: str, case: Case, report: Report, deadline: float) -> None:
    if time.time() > deadline:
        report.skip(section, case.name, TIME_WAS_UP)
        return
    print(f"{section}: {case.name}", flush=True)
    report.begin(section, case.name, case.limit_s)
    try:
        for row in case.run():
            report.add(section, case.name, row)
        report.end(section, case.name)
        return
    except Skip as why:
        report.skip(section, case.name, str(why))
        return
    except Exception:  # any error belongs to the case
        error = _short(traceback.format_exc())
    report.fail(section, case.name, error)
    print(f"  FAILED {section}: {case.name}: {last_line(error)}", flush=True)
    if section not in OTHERS_DEVICE and not _device_works():
        raise DeviceLost(f"{section}: {case.name}")


def _device_works() -> bool:
    import jax.numpy as jnp

    try:
        return float(jnp.arange(8.0).sum()) == 28.0
    except Exception:
        return False


def _short(error: str, characters: int = 1500) -> str:
    """End of a traceback, which has the message, and its beginning if the message is long."""
    return error if len(error) <= characters else error[: characters // 3] + "\n[...]\n" + error[-2 * characters // 3 :]
