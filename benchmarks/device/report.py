"""Results so far, as NAME.json and NAME.md in one folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.device import predictions

Row = dict[str, Any]
"""Column -> value. `ok` False marks a check that failed."""
TIME_WAS_UP = "the time was up"
HIDDEN = ("sections", "doing", "ceilings", "expected", "planned", "boot")
"""Fields that the Markdown leaves out, or tells in its own way."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One check or measurement.

    Attributes:
        run: returns its rows; each is written when it comes, so a generator keeps its rows.
        limit_s: seconds after which the case is taken for hanging, and its process killed.
        priority: of the cases of sections that share a process those with the lowest number run first.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    limit_s: float = 120.0
    priority: int = 0


class Report:
    """The folder's two files. Processes take turns: each reads the file that the one before wrote.

    Args:
        name: file name without its ending.
        earlier: further folders with reports of other calls.
    """

    def __init__(self, folder: Path, name: str = "device", earlier: Iterable[Path] = ()):
        self._folders = [folder, *earlier]
        self._json = folder / f"{name}.json"
        self.content: dict[str, Any] = _read(self._json) or {"complete": False, "sections": {}}

    @functools.cached_property
    def _earlier(self) -> list[tuple[str, dict[str, Any]]]:
        """File name and content of other calls' reports, from the same machine since it was started."""
        patterns = ("call-*.json", "device.json")
        files = [file for folder in self._folders for pattern in patterns for file in sorted(folder.glob(pattern))]
        found = [(file.name, _read(file)) for file in files if file.resolve() != self._json.resolve()]
        boot = self.content.get("boot")
        return [(name, content) for name, content in found if content and boot and content.get("boot") == boot]

    @property
    def doing(self) -> tuple[str, str, float, float] | None:
        """Section and case that were begun and did not end, when they were begun (`time.time()`), and limit in seconds."""
        doing = self.content.get("doing")
        return None if doing is None else (doing[0], doing[1], doing[2], doing[3])

    @property
    def ceilings(self) -> dict[str, float] | None:
        """Measurements of the section `machine`, in bytes and operations a second."""
        return self.content.get("ceilings")

    def adopt_ceilings(self) -> None:
        """Takes them from an earlier call on the same machine, and says from which."""
        for name, content in self._earlier:
            if {"copy", "matrix", "link"} <= set(content.get("ceilings") or {}):
                self.update(ceilings=content["ceilings"], **{"ceilings from": name})
                return

    def rows(self, section: str) -> list[Row]:
        """Rows of all cases so far. Those of an earlier call on the same machine where this one has none of the section."""
        for content in (self.content, *(content for _, content in self._earlier)):
            if section in content["sections"]:
                return [row for case in content["sections"][section].values() for row in case.get("rows", [])]
        return []

    def has(self, section: str, case: str) -> bool:
        """Whether the case has come to an end."""
        return case in self._cases(section) and (self.doing or ())[:2] != (section, case)

    def failed(self, section: str, case: str) -> bool:
        return "error" in self._cases(section).get(case, {})

    def update(self, **fields: Any) -> None:
        self.content |= fields
        self._write()

    def expect(self, section: str, cases: Iterable[str]) -> None:
        """Writes down the cases of a section, so that those which never come are known."""
        self.update(expected=self.content.get("expected", {}) | {section: list(cases)})

    def begin(self, section: str, case: str, limit_s: float) -> None:
        self.update(doing=[section, case, time.time(), limit_s])

    def idle(self) -> None:
        """Nothing is being done."""
        self.content.pop("doing", None)
        self._write()

    def add(self, section: str, case: str, row: Row) -> None:
        """A row of a case that goes on."""
        cases = self.content["sections"].setdefault(section, {})
        cases.setdefault(case, {}).setdefault("rows", []).append(row)
        self._write()

    def end(self, section: str, case: str, rows: Iterable[Row] = ()) -> None:
        """Rows beside those that were added."""
        self._record(section, case, {"rows": [*self._cases(section).get(case, {}).get("rows", []), *rows]})

    def fail(self, section: str, case: str, error: str) -> None:
        self._record(section, case, {"error": error})

    def skip(self, section: str, case: str, why: str) -> None:
        self._record(section, case, {"skipped": why})

    @property
    def failures(self) -> list[str]:
        """Cases that raised or hung, and checks that did not hold."""
        found = []
        for section, cases in self.content["sections"].items():
            for name, case in cases.items():
                if "error" in case or any(row.get("ok") is False for row in case.get("rows", [])):
                    found.append(f"{section}: {name}")
        return found

    @property
    def measured(self) -> bool:
        """Whether there is any row that is not about something skipped."""
        cases = [case for section in self.content["sections"].values() for case in section.values()]
        return any("skipped" not in row for case in cases for row in case.get("rows", []))

    @property
    def missing(self) -> list[str]:
        """Planned sections, and cases of sections that were begun, without a result."""
        found = []
        expected = self.content.get("expected", {})
        for section in self.content.get("planned", []):
            if section not in expected:
                found.append(f"{section}: all")
                continue
            for case in expected[section]:
                if not self.has(section, case) or self._cases(section)[case].get("skipped") == TIME_WAS_UP:
                    found.append(f"{section}: {case}")
        return found

    def close(self, seconds: float) -> None:
        """The call has ended; it is complete where nothing is missing."""
        self.content.pop("doing", None)
        self.update(seconds=round(seconds, 1), complete=not self.missing)
        self._json.with_suffix(".partial").unlink(missing_ok=True)

    def _cases(self, section: str) -> dict[str, Any]:
        return self.content["sections"].get(section, {})

    def _record(self, section: str, case: str, result: dict[str, Any]) -> None:
        doing = self.content.pop("doing", None)
        seconds = {} if doing is None else {"seconds": round(time.time() - doing[2], 2)}
        cases = self.content["sections"].setdefault(section, {})
        cases[case] = cases.get(case, {}) | result | seconds
        self._write()

    def _write(self) -> None:
        """Each file at once or not at all."""
        for file, text in (
            (self._json, json.dumps(self.content, indent=1) + "\n"),
            (self._json.with_suffix(".md"), self.text()),
        ):
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, file)

    def text(self) -> str:
        """All of it in Markdown."""
        lines = ["# Measured on the device", ""]
        lines += [f"- {line}" for line in predictions.summary(self.content["sections"])]
        lines += [f"- {key}: {value}" for key, value in self.content.items() if key not in HIDDEN]
        lines += [f"- missing: {line}" for line in _by_section(self.missing)]
        lines += [f"- not in order: {failure}" for failure in self.failures]
        for section, cases in self.content["sections"].items():
            seconds = sum(case.get("seconds", 0.0) for case in cases.values())
            lines += ["", f"## {section} ({seconds:.0f} s)", ""]
            lines += _tables([row for case in cases.values() for row in case.get("rows", [])])
            for name, case in cases.items():
                for word in set(case) & {"error", "skipped"}:
                    lines.append(f"- {name}: {word}: {last_line(case[word])}")
        return "\n".join(lines) + "\n"


def last_line(error: str) -> str:
    """The line of a traceback that has the message."""
    return (error.strip().splitlines() or [""])[-1][:300]


def _read(file: Path) -> dict[str, Any] | None:
    """A report's content; None: there is none, or it is something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("sections"), dict) else None


def _by_section(missing: list[str]) -> list[str]:
    """A line a section, long lists cut."""
    cases: dict[str, list[str]] = {}
    for line in missing:
        section, case = line.split(": ", 1)
        cases.setdefault(section, []).append(case)
    return [f"{section}: {'; '.join(c[:3])}" + f" and {len(c) - 3} more" * (len(c) > 3) for section, c in cases.items()]


def _tables(rows: list[Row]) -> list[str]:
    """Rows of like columns side by side make a table."""
    lines: list[str] = []
    header: list[str] = []
    for row in rows:
        if list(row) != header:
            header = list(row)
            lines += [""] * bool(lines) + ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
    return [*lines, ""] if lines else lines
