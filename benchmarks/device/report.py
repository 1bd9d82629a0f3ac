"""Report with the results so far, as NAME.json and NAME.md in one folder."""

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
from benchmarks.machine import Row, markdown

TIME_WAS_UP = "the time was up"
HIDDEN = ("sections", "doing", "ceilings", "expected", "planned", "boot")
"""Fields that the Markdown omits, or shows in its own way."""


class Skip(Exception):
    """Reason why a case is not measured."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One check or measurement.

    Attributes:
        run: Returns the rows. Each is written when it comes, so a generator keeps its rows; `ok` False marks a failed check.
        limit_s: Seconds after which the case counts as hanging, and its process is killed.
        priority: Cases of sections that share a process run in this order, the lowest number first.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    limit_s: float = 120.0
    priority: int = 0


class Report:
    """Two files of a folder. Processes take turns: each reads the file that the one before wrote.

    Args:
        name: File name without its ending.
        earlier: Further folders with reports of other calls.
    """

    def __init__(self, folder: Path, name: str = "device", earlier: Iterable[Path] = ()):
        self._folders = [folder, *earlier]
        self._json = folder / f"{name}.json"
        self.content: dict[str, Any] = _read(self._json) or {"complete": False, "sections": {}}

    @functools.cached_property
    def _earlier(self) -> list[tuple[str, dict[str, Any]]]:
        """File names and contents of other calls' reports from this machine since it was started."""
        patterns = ("call-*.json", "device.json")
        files = [file for folder in self._folders for pattern in patterns for file in sorted(folder.glob(pattern))]
        found = [(file.name, _read(file)) for file in files if file.resolve() != self._json.resolve()]
        boot = self.content.get("boot")
        return [(name, content) for name, content in found if content and boot and content.get("boot") == boot]

    @property
    def doing(self) -> tuple[str, str, float, float] | None:
        """Section and case that were begun and did not end, the time of their begin (`time.time()`), and limit in seconds."""
        doing = self.content.get("doing")
        return None if doing is None else (doing[0], doing[1], doing[2], doing[3])

    @property
    def ceilings(self) -> dict[str, float] | None:
        """Measurements of the section `machine`, in bytes and operations a second."""
        return self.content.get("ceilings")

    def adopt_ceilings(self) -> None:
        """Take the ceilings of an earlier call on the same machine, and record its name."""
        for name, content in self._earlier:
            if {"copy", "matrix", "link"} <= set(content.get("ceilings") or {}):
                self.update(ceilings=content["ceilings"], **{"ceilings from": name})
                return

    def rows(self, section: str) -> list[Row]:
        """Rows of all cases so far, or of an earlier call on the same machine if this one lacks the section."""
        for content in (self.content, *(content for _, content in self._earlier)):
            if section in content["sections"]:
                return [row for case in content["sections"][section].values() for row in case.get("rows", [])]
        return []

    def find(self, section: str, **values: Any) -> Row | None:
        """First measured row of a section with these values."""
        rows = (row for row in self.rows(section) if "skipped" not in row)
        return next((row for row in rows if all(row.get(name) == value for name, value in values.items())), None)

    def has(self, section: str, case: str) -> bool:
        """Return whether the case has ended."""
        return case in self._cases(section) and (self.doing or ())[:2] != (section, case)

    def failed(self, section: str, case: str) -> bool:
        return "error" in self._cases(section).get(case, {})

    def update(self, **fields: Any) -> None:
        self.content |= fields
        self._write()

    def expect(self, section: str, cases: Iterable[str]) -> None:
        """Record the cases of a section, so that missing ones are known."""
        self.update(expected=self.content.get("expected", {}) | {section: list(cases)})

    def begin(self, section: str, case: str, limit_s: float) -> None:
        self.update(doing=[section, case, time.time(), limit_s])

    def idle(self) -> None:
        """Record that no case is running."""
        self.content.pop("doing", None)
        self._write()

    def add(self, section: str, case: str, row: Row) -> None:
        """Add a row of a case that goes on."""
        cases = self.content["sections"].setdefault(section, {})
        cases.setdefault(case, {}).setdefault("rows", []).append(row)
        self._write()

    def end(self, section: str, case: str, rows: Iterable[Row] = ()) -> None:
        """End a case, with rows beside the added ones."""
        self._record(section, case, {"rows": [*self._cases(section).get(case, {}).get("rows", []), *rows]})

    def fail(self, section: str, case: str, error: str) -> None:
        self._record(section, case, {"error": error})

    def skip(self, section: str, case: str, why: str) -> None:
        self._record(section, case, {"skipped": why})

    @property
    def failures(self) -> list[str]:
        """Cases that raised or hung, and cases whose checks failed."""
        found = []
        for section, cases in self.content["sections"].items():
            for name, case in cases.items():
                if "error" in case or any(row.get("ok") is False for row in case.get("rows", [])):
                    found.append(f"{section}: {name}")
        return found

    @property
    def measured(self) -> bool:
        """Whether any row was measured and not skipped."""
        cases = [case for section in self.content["sections"].values() for case in section.values()]
        return any("skipped" not in row for case in cases for row in case.get("rows", []))

    @property
    def missing(self) -> list[str]:
        """Planned sections, and cases of begun sections, that have no result."""
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
        """End the call, which is complete if nothing is missing."""
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
        """Write both files, each at once or not at all."""
        for file, text in (
            (self._json, json.dumps(self.content, indent=1) + "\n"),
            (self._json.with_suffix(".md"), self.text()),
        ):
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, file)

    def text(self) -> str:
        """Text of the report in Markdown."""
        lines = ["# Measured on the device", ""]
        lines += [f"- {line}" for line in predictions.summary(self.content["sections"])]
        lines += [f"- {key}: {value}" for key, value in self.content.items() if key not in HIDDEN]
        lines += [f"- missing: {line}" for line in _by_section(self.missing)]
        lines += [f"- not in order: {failure}" for failure in self.failures]
        for section, cases in self.content["sections"].items():
            seconds = sum(case.get("seconds", 0.0) for case in cases.values())
            lines += ["", f"## {section} ({seconds:.0f} s)", ""]
            lines += [*(table := markdown(row for case in cases.values() for row in case.get("rows", []))), *[""] * bool(table)]
            for name, case in cases.items():
                for word in set(case) & {"error", "skipped"}:
                    lines.append(f"- {name}: {word}: {last_line(case[word])}")
        return "\n".join(lines) + "\n"


def last_line(error: str) -> str:
    """Line of a traceback that has the message."""
    return (error.strip().splitlines() or [""])[-1][:300]


def _read(file: Path) -> dict[str, Any] | None:
    """Content of a report; None if the file is missing or is no report."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("sections"), dict) else None


def _by_section(missing: list[str]) -> list[str]:
    """Lines of missing cases, one a section, long lists cut."""
    cases: dict[str, list[str]] = {}
    for line in missing:
        section, case = line.split(": ", 1)
        cases.setdefault(section, []).append(case)
    return [f"{section}: {'; '.join(c[:3])}" + f" and {len(c) - 3} more" * (len(c) > 3) for section, c in cases.items()]
