"""Processes that end in time, killed with all their children in any session."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.1
PARENT_SECONDS = 3.0
"""Time before its parent's deadline at which a child ends."""
KILL_SECONDS = 5.0
"""Patience with a killed process that the kernel does not end."""
PR_SET_CHILD_SUBREAPER = 36


def run(command: Sequence[str], environment: Mapping[str, str], overdue: Callable[[], str]) -> tuple[str, str]:
    """Run a command until it ends or `overdue` gives a reason why it must not go on.

    Returns:
        The reason for which the process was killed, or its exit code in words; and the end of its error output.
    """
    adopt_orphans()
    others = _children()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, env=dict(environment), start_new_session=True)
        why = ""
        try:
            while process.poll() is None and not why:
                time.sleep(POLL_SECONDS)
                why = overdue()
        finally:
            code = process.poll()
            kill_descendants(process, others)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 3000))
        return (why if code is None else exit_code(code)), errors.read().decode(errors="replace")[-1500:].strip()


def exit_code(code: int) -> str:
    return f"exit code {code}"


def run_json(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> tuple[str | None, list[str]]:
    """Run a command that prints lines, within the caller's own process group.

    Returns:
        The reason for which there is no result, None if there is one; and the lines.

    Raises:
        RuntimeError: The command failed.
    """
    try:
        ran = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired as expired:
        told = (expired.stdout or b"").decode().strip().splitlines()
        return f"more than {limit_s:.0f} s; {told[-1] if told else 'nothing was printed'}", told
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}\n{ran.stderr[-1200:]}")
    return None, ran.stdout.strip().splitlines()


def seconds_until(deadline: float, limit_s: float) -> float:
    """Limit of a child in seconds, so that its parent can still write before its own deadline (`time.time()`)."""
    return min(limit_s, deadline - time.time() - PARENT_SECONDS)


def adopt_orphans() -> None:
    """Make children whose parents end this process's own, so that they can be found and killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(process: subprocess.Popen[bytes], others: frozenset[int]) -> None:
    """Kill a process that was started in a session of its own, and everything that it started.

    Children of this process that are in `others` are left alone.
    """
    end = time.monotonic() + KILL_SECONDS
    known = {process.pid}
    while time.monotonic() < end:
        if process.poll() is None:  # not reaped: the number is still its own
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process.pid, signal.SIGKILL)
        living = _living()
        for pid, (parent, session) in living.items():
            orphan = parent == os.getpid() and pid not in others
            if session == process.pid or parent in known or orphan:
                known.add(pid)
        found = known & living.keys()
        if process.poll() is not None and not found - {process.pid}:
            return
        for pid in found - {process.pid}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found - {process.pid}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _children() -> frozenset[int]:
    return frozenset(pid for pid, (parent, _) in _living().items() if parent == os.getpid())


def _living() -> dict[int, tuple[int, int]]:
    """Parent and session of each process that is no zombie.

    The system shows a process as a zombie if its other threads outlive the first.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                (state, parent, _, session), threads = fields[:4], int(fields[17])
                if state != "Z" or threads > 1:
                    found[int(folder.name)] = (int(parent), int(session))
    return found
