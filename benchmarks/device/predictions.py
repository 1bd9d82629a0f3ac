"""Predicted milliseconds and rates of Llama-7B in bfloat16, by device: read from compiled H100 programs, kernel by kernel.

They were made before any GPU had run the code; docs/performance.md has an H200's measurements beside them. docs/experiments.md
has their reasons, and older predictions, which these replace.
"""

from __future__ import annotations

import statistics
from typing import Any

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
"""Device kinds, as JAX names them."""
CONTEXT = 512
"""Tokens of a decode step's rows."""
PREFILL_TOKENS = 2048
Mixes = dict[tuple[int, str], float]

DECODE_MS: dict[str, Mixes] = {
    H100: {
        (1, "base"): 5.8,
        (32, "base"): 8.9,
        (32, "rank 16, q k v o"): 9.9,
        (32, "mixed ranks, q k v o"): 10.9,
        (128, "base"): 19.1,
        (128, "mixed ranks, q k v o"): 25.9,
    },
    H200: {
        (1, "base"): 4.35,
        (32, "base"): 6.4,
        (32, "rank 16, q k v o"): 7.3,
        (32, "mixed ranks, q k v o"): 8.0,
        (128, "base"): 13.6,
        (128, "mixed ranks, q k v o"): 18.5,
    },
}
"""Steps of CONTEXT tokens a row, by rows and adapters."""
PREFILL_MS = {"base": 48.0, "mixed ranks, all seven": 53.8}
"""One prompt of PREFILL_TOKENS, on both devices. With adapters on all seven targets: 48 ms times 1.10 to 1.14
(docs/experiments.md), with 1.12 in the middle. Both predate tiles that are ordered, the longest first."""
LOADED_GB_PER_S = {32: 33.0}
"""Adapters loaded beside decode steps with mixed ranks on q k v o, by the step's rows, on both devices where the link is not
slower: 1 GiB in three steps of the H100's predicted length."""


def decode_ms(device: str, rows: int, context: int, adapters: str) -> float | None:
    return DECODE_MS.get(device, {}).get((rows, adapters)) if context == CONTEXT else None


def prefill_ms(device: str, prompts: str, adapters: str) -> float | None:
    return PREFILL_MS.get(adapters) if device in DECODE_MS and prompts == f"1 prompt of {PREFILL_TOKENS}" else None


def loaded_gb_per_s(device: str, rows: int) -> float | None:
    return LOADED_GB_PER_S.get(rows) if device in DECODE_MS else None


def beside(predicted_ms: float | None, ms: float) -> dict[str, Any]:
    """Columns of a row: the predicted time, and the measured time in percent of it, above 100 if it took longer."""
    share = "" if predicted_ms is None else round(100 * ms / predicted_ms, 1)
    return {"predicted ms": "" if predicted_ms is None else predicted_ms, "% of predicted": share}


def summary(sections: dict[str, Any]) -> list[str]:
    """Line that compares measured times with predicted ones; none if nothing was predicted."""
    rows = [row for cases in sections.values() for case in cases.values() for row in case.get("rows", [])]
    shares = sorted(row["% of predicted"] for row in rows if row.get("% of predicted") not in (None, ""))
    if not shares:
        return []
    return [
        f"measured against predicted, {len(shares)} steps: {shares[0]} to {shares[-1]} % of the predicted time, median "
        f"{statistics.median(shares):.1f} % (above 100: it took longer than predicted)"
    ]
