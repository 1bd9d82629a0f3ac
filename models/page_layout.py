"""Content of a page of the pool, as KV and as LoRA rows, and the places of an adapter's rows in its pages.

The pool is one array `[num_pages, page_elems]` for each layer; a page id means the same page in every layer. A page with KV is
`[2, num_kv_heads, page_tokens, head_dim]`. A page with an adapter holds rows: for each target the r rows of A (`d_in` elements
each), then the r rows of B transposed (`d_out` each), then, where it has vectors, the scale and the shift of its outputs. They
lie back to back, a row never straddling a page. The address of row i of such a run follows from the run's start
(`row_address`), so a device step needs one number a run, not a table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chameleon_jax.models.config import ALL_TARGETS, TARGETS, LlamaConfig

if TYPE_CHECKING:
    from jaxtyping import Int

TRASH_PAGE = 0
"""Page that padding reads. It is never handed out, and its content means nothing."""
RUNS = 3
"""Runs of rows of a target: of A, of B, and of vectors."""
NO_RUN = -1
"""Start that stands for a run which an adapter lacks."""
VECTOR_ROWS = 2
"""Rows of a run of vectors: scale less 1, and shift."""


@dataclasses.dataclass(frozen=True)
class AdapterPlacement:
    """Places of an adapter's rows in its own pages, counted from its first page.

    Attributes:
        ranks: `target -> rank`.
        starts: `target -> starts of its runs`, in elements from the adapter's first page; NO_RUN for one that it lacks.
        num_pages: Pages that the adapter takes.
    """

    ranks: dict[str, int]
    starts: dict[str, tuple[int, int, int]]
    num_pages: int

    @property
    def vectors(self) -> frozenset[str]:
        """Targets that have vectors."""
        return frozenset(target for target, (_, _, start) in self.starts.items() if start != NO_RUN)

    @functools.cached_property
    def rank_of_targets(self) -> Int[np.ndarray, " targets"]:
        """Rank of each target, int32; 0 where the adapter lacks the target."""
        return np.array([self.ranks.get(t, 0) for t in ALL_TARGETS], np.int32)

    @functools.cached_property
    def num_targets(self) -> int:
        """Targets, from the first of ALL_TARGETS on, that a program has to adapt; all of them for an adapter with vectors."""
        return len(ALL_TARGETS) if self.vectors else 1 + max(ALL_TARGETS.index(t) for t in self.ranks)

    @functools.cached_property
    def start_of_runs(self) -> Int[np.ndarray, " _"]:
        """Starts of the runs of each of ALL_TARGETS in turn, int32."""
        return np.array([self.starts.get(t, (0, 0, NO_RUN)) for t in ALL_TARGETS], np.int32).ravel()


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedAdapter:
    """Adapter in the pool: its placement, and the ids of its pages in order."""

    placement: AdapterPlacement
    pages: Sequence[int]

    @functools.cached_property
    def table_row(self) -> Int[np.ndarray, " starts_and_pages"]:
        """Starts of the adapter's runs, then its pages; int32."""
        return np.concatenate([self.placement.start_of_runs, np.asarray(self.pages, np.int32)])


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Geometry of a page for one model."""

    config: LlamaConfig
    page_tokens: int

    @classmethod
    def for_model(cls, config: LlamaConfig, page_tokens: int = 16, extras: bool = False) -> PageLayout:
        """Choose the page size: at least `page_tokens` tokens, more where the model's widest LoRA row would not fit.

        Args:
            config: The model.
            page_tokens: Least tokens of a page.
            extras: Whether adapters may change matrices of the vocabulary.
        """
        widest = max(max(config.target_shape(t)) for t in (ALL_TARGETS if extras else TARGETS))
        token_elems = 2 * config.num_kv_heads * config.head_dim
        while page_tokens * token_elems < widest:
            page_tokens *= 2
        return cls(config, page_tokens)

    @property
    def page_elems(self) -> int:
        """Elements of a page in one layer."""
        return 2 * self.config.num_kv_heads * self.page_tokens * self.config.head_dim

    @functools.cached_property
    def row_unit(self) -> int:
        """Number of elements, at most 16, that divides every LoRA row's offset in its page and its length."""
        return math.gcd(16, *(width for target in ALL_TARGETS for width in self.config.target_shape(target)))

    def page_bytes(self, itemsize: int) -> int:
        """Compute the bytes of a page over all layers, from the bytes of an element."""
        return self.page_elems * self.config.num_layers * itemsize

    def pages_for_tokens(self, tokens: int) -> int:
        """Count the pages that hold the KV of `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def row_address(self, start: int, row: int, width: int) -> tuple[int, int]:
        """Compute `(page, offset)` of a row in a run that starts at element `start` and has rows of `width` elements."""
        page, offset = divmod(start, self.page_elems)
        first = (self.page_elems - offset) // width
        if row < first:
            return page, offset + row * width
        page_step, slot = divmod(row - first, self.page_elems // width)
        return page + 1 + page_step, slot * width

    def runs(self, target: str, rank: int, vectors: bool) -> list[tuple[int, int]]:
        """List the runs of a target, as the number of rows and their width."""
        d_in, d_out = self.config.target_shape(target)
        return [(rank, d_in), (rank, d_out), *([(VECTOR_ROWS, d_out)] if vectors else [])]

    def place(self, ranks: dict[str, int], vectors: Collection[str] = ()) -> AdapterPlacement:
        """Place runs of rows back to back, in the order of ALL_TARGETS.

        Args:
            ranks: `target -> rank`.
            vectors: Targets that have vectors, some of those in `ranks`.
        """
        starts: dict[str, tuple[int, int, int]] = {}
        end = 0
        for target in ALL_TARGETS:
            if target not in ranks:
                continue
            found = []
            for rows, width in self.runs(target, ranks[target], target in vectors):
                if self.page_elems - end % self.page_elems < width:
                    end = math.ceil(end / self.page_elems) * self.page_elems
                found.append(end)
                page, offset = self.row_address(end, rows - 1, width)
                end = page * self.page_elems + offset + width
            starts[target] = (found[0], found[1], found[2] if target in vectors else NO_RUN)
        return AdapterPlacement(dict(ranks), starts, math.ceil(end / self.page_elems))

    def row_units(self, placement: AdapterPlacement) -> Int[np.ndarray, " units"]:
        """Find the places of an adapter's rows in its pages, in units of `row_unit` elements from its first page; int32.

        Units are in the order of `models.adapters.weights.AdapterWeights.rows`.
        """
        runs = []
        for target, rank in placement.ranks.items():
            for start, (count, width) in zip(placement.starts[target], self.runs(target, rank, target in placement.vectors)):
                addresses = [self.row_address(start, row, width) for row in range(count)]
                rows = np.array([page * self.page_elems + offset for page, offset in addresses])
                runs.append((rows[:, None] + np.arange(0, width, self.row_unit)).ravel())
        return (np.concatenate(runs) // self.row_unit).astype(np.int32)
