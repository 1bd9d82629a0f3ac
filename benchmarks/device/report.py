"""What was found so far, as device.json and device.md in one folder."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Column -> value. `ok` False marks a check that failed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is checked or measured; `run` returns its rows."""

    name: str
    run: Callable[[], list[Row]]


class Report:
    """The folder's two files. Processes take turns: each reads what the one before wrote."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._json = folder / "device.json"
        self.content: dict[str, Any] = {"sections": {}}
        if self._json.is_file():
            self.content = json.loads(self._json.read_text())

    @property
    def doing(self) -> tuple[str, str] | None:
        """Section and case that were begun and did not end."""
        doing = self.content.get("doing")
        return None if doing is None else (doing[0], doing[1])

    @property
    def ceilings(self) -> dict[str, float] | None:
        """What the section `machine` measured, in bytes and operations a second."""
        return self.content.get("ceilings")

    def rows(self, section: str) -> list[Row]:
        """Of all cases that ended."""
        return [row for case in self._cases(section).values() for row in case.get("rows", [])]

    def has(self, section: str, case: str) -> bool:
        return case in self._cases(section)

    def update(self, **fields: Any) -> None:
        self.content |= fields
        self._write()

    def begin(self, section: str, case: str) -> None:
        self.update(doing=[section, case, time.time()])

    def end(self, section: str, case: str, rows: list[Row]) -> None:
        self._record(section, case, {"rows": rows})

    def fail(self, section: str, case: str, error: str) -> None:
        self._record(section, case, {"error": error})

    def skip(self, section: str, case: str, why: str) -> None:
        self._record(section, case, {"skipped": why})

    @property
    def failures(self) -> list[str]:
        """Cases that raised, and checks that did not hold."""
        found = []
        for section, cases in self.content["sections"].items():
            for name, case in cases.items():
                if "error" in case or any(row.get("ok") is False for row in case.get("rows", [])):
                    found.append(f"{section}: {name}")
        return found

    def _cases(self, section: str) -> dict[str, Any]:
        return self.content["sections"].setdefault(section, {})

    def _record(self, section: str, case: str, result: dict[str, Any]) -> None:
        doing = self.content.pop("doing", None)
        seconds = {} if doing is None else {"seconds": round(time.time() - doing[2], 2)}
        self._cases(section)[case] = result | seconds
        self._write()

    def _write(self) -> None:
        """Each file at once or not at all."""
        for file, text in ((self._json, json.dumps(self.content, indent=1) + "\n"), (self._folder / "device.md", self.text())):
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, file)

    def text(self) -> str:
        """All of it in Markdown."""
        lines = ["# Measured on the device", ""]
        lines += [f"- {key}: {value}" for key, value in self.content.items() if key not in ("sections", "doing", "ceilings")]
        lines += [f"- not in order: {failure}" for failure in self.failures]
        for section, cases in self.content["sections"].items():
            seconds = sum(case.get("seconds", 0.0) for case in cases.values())
            lines += ["", f"## {section} ({seconds:.0f} s)", ""]
            lines += _tables([row for case in cases.values() for row in case.get("rows", [])])
            for name, case in cases.items():
                for word in set(case) & {"error", "skipped"}:
                    lines.append(f"- {name}: {word}: {case[word].strip().splitlines()[-1][:300]}")
        return "\n".join(lines) + "\n"


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
