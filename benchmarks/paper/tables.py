"""Tables of paper and ours in Markdown and JSON, checks of orders, and a figure's outcome."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Plot

from benchmarks.paper.statistics import Estimate

Row = dict[str, Any]
"""Cells by column: text, numbers, Estimates; None prints as "-"."""


def number(value: float, sign: bool = False) -> str:
    """Format with three significant digits, and all digits before the point."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "over 512"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:{'+' if sign else ''},.{min(digits, 4)}f}"


def cell(value: Any, sign: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        text = number(value.value, sign)
        return text if math.isnan(value.low) else f"{text} [{number(value.low, sign)}, {number(value.high, sign)}]"
    return number(value, sign) if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """Value for JSON."""
    if isinstance(value, Estimate):
        return {"mean": plain(value.value), "interval": [plain(value.low), plain(value.high)]}
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def compare(quantity: str, paper: float | str | None, ours: float | Estimate | None, unit: str = "") -> Row:
    """Row of paper, ours and their difference, in the unit of both."""
    value = ours.value if isinstance(ours, Estimate) else ours
    number_of_paper = float(paper) if isinstance(paper, (int, float)) else None
    both = number_of_paper is not None and value is not None and math.isfinite(value)
    return {
        "quantity": f"{quantity}, {unit}" if unit else quantity,
        "paper": number_of_paper if number_of_paper is not None else paper,
        "ours": ours,
        "difference": value - number_of_paper if both else None,  # type: ignore[operator]
    }


@dataclasses.dataclass(frozen=True)
class Table:
    """Table of a figure; its `setting` says that it is simulated, on which profile, over which seeds."""

    title: str
    rows: Sequence[Row]
    setting: str
    note: str = ""

    def markdown(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [f"### {self.title}", "", f"*{self.setting}*", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(cell(row.get(name), name == "difference") for name in columns) + " |")
        return "\n".join([*lines, *(("", self.note) if self.note else ())]) + "\n"

    def json(self) -> dict[str, Any]:
        rows = [{name: plain(value) for name, value in row.items()} for row in self.rows]
        return {"title": self.title, "setting": self.setting, "note": self.note, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Check:
    """Check of an order that the paper reports; `items` are in the paper's order, each no larger than the next."""

    name: str
    items: Sequence[tuple[str, float]]

    @property
    def passes(self) -> bool:
        values = [value for _, value in self.items]
        return all(a <= b for a, b in zip(values, values[1:], strict=False)) and not any(map(math.isnan, values))

    @property
    def ties(self) -> bool:
        """Whether all are equal within half a per cent, which makes their order void."""
        values = [value for _, value in self.items]
        return max(values) <= 1.005 * min(values)

    def text(self) -> str:
        return f"{'PASS' if self.passes else 'DIFFERS'}{' (all equal)' * self.ties}: {self.name}: " + ", ".join(
            f"{name} {number(v)}" for name, v in self.items
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Tables, plot and checks of one figure."""

    title: str
    tables: Sequence[Table]
    plot: Plot
    checks: Sequence[Check] = ()

    def markdown(self, image: str) -> str:
        parts = [f"## {self.title}", *(table.markdown() for table in self.tables), f"![{self.title}]({image})"]
        checks = "\n".join(f"- {check.text()}" for check in self.checks)
        return "\n\n".join([*parts, checks] if checks else parts) + "\n"
