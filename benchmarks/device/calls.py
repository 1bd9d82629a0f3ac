"""The three calls of a half hour on a GPU: their sections in order, and limits in seconds.

The most valuable sections run first. Expected seconds of calls 1 and 2 were measured on an H200, where half of call 1's
programs were compiled before. Call 3 has predictions for an H100 with nothing compiled before.
"""

from __future__ import annotations

import dataclasses

CALL_SECONDS = 560.0
"""Limit of a call, within which it ends by itself."""
PACK_SECONDS = 20.0
"""Last seconds of a call, in which processes are killed and compiled programs are packed."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Sections that share a process, and with it an engine.

    Attributes:
        expected_s: Seconds that it takes, at most `limit_s`.
        limit_s: Seconds after which the group is cut off; seconds that groups before it left over are added.
    """

    sections: tuple[str, ...]
    expected_s: float
    limit_s: float


CALLS: tuple[tuple[Group, ...], ...] = (
    (
        Group(("smoke",), 10, 60),
        Group(("machine", "correctness"), 155, 165),  # took 195 s of its own and smoke's time, and lacked five cases
        Group(("decode", "prefill", "mixed"), 115, 185),  # of them 20 predicted, for `mixed`
        Group(("peers",), 130, 130),  # took 146 s. Torch takes the device; beside the rows of decode and prefill
    ),
    (
        Group(("loads", "host", "ops"), 75, 220),
        Group(("serve_curve",), 290, 320),
    ),
    (
        Group(("variants",), 165, 190),
        Group(("startup",), 280, 300),
        Group(("autotuning",), 50, 50),
    ),
)
GROUPS = tuple(group for call in CALLS for group in call)
SECTIONS = tuple(section for group in GROUPS for section in group.sections)


def deadlines(groups: tuple[Group, ...], begin: float) -> list[float]:
    """Deadline of each group of a call that begins at `begin`, seconds."""
    ends = []
    for group in groups:
        begin += group.limit_s
        ends.append(begin)
    return ends


def plan() -> str:
    """Text of the calls: commands, sections in order, seconds."""
    lines = [
        f"Three calls of at most {CALL_SECONDS:.0f} s each. Expected seconds of calls 1 and 2 were measured on an H200,",
        "where half of call 1's programs were compiled before; those of call 3 are predictions.",
    ]
    for number, groups in enumerate(CALLS, 1):
        expected = sum(group.expected_s for group in groups)
        lines += ["", f"call {number}: {expected:.0f} s expected", f"    {command(number)}"]
        for group, end in zip(groups, deadlines(groups, 0.0)):
            names = ", ".join(group.sections)
            lines.append(f"  {names:<22} {group.expected_s:4.0f} s expected, cut off {end:.0f} s after the call began")
        lines.append(f"  {'pack the programs':<22} {'':4}   done by {CALL_SECONDS:.0f} s")
    return "\n".join([*lines, "", *NOTES])


def command(number: int) -> str:
    cache = " --cache results" if number in WITH_PROGRAMS else ""
    return f"python -m benchmarks device --call {number} --out results{cache}"


WITH_PROGRAMS = (2,)
"""Calls that an earlier call's programs make faster. In the third call nearly all programs are new."""
NOTES = (
    "--out: the only folder with results: call-N.json, call-N.md and call-N-programs-1.zip to -4.zip (12 MiB each at most).",
    "  If a machine gives back one folder only, name that one.",
    "--cache: takes along one earlier call's programs, up to 48 MiB, and compares with its report. If a machine gets its",
    "  files by copying, copy that call's zip and json files into a folder of the checkout that git ignores, and name it.",
    "  A machine that ran the call before may have the programs in .cache/device-programs already. Call 3 needs none.",
    f"Time: three calls of {CALL_SECONDS:.0f} s are {3 * CALL_SECONDS:.0f} s, and the machine's start comes on top.",
    "  Give the last call the remaining time with --budget SECONDS: its first group is the most valuable, and fits 210 s.",
    "Remainder: run a call that was cut off again by the same command with --cache, or in part:",
    "  python -m benchmarks device --sections a,b --budget SECONDS --out DIR --cache DIR",
    "Exit code: 0 if all was measured and no check failed.",
)
