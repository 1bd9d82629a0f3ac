"""What one page of the pool holds, as KV and as LoRA rows, and how an adapter is packed into pages.

The pool is one array `[num_pages, page_elems]` for each layer; a page id means the same page in every layer. As KV a page
is `[2, num_kv_heads, page_tokens, head_dim]`. As adapter storage it holds rows: for each target the r rows of A (`d_in`
elements each), then the r rows of B transposed (`d_out` each), back to back, a row never straddling a page. Where row i of
such a run lies follows from where the run starts (`row_address`), so a device step needs one number a run, not a table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import TARGETS, LlamaConfig

TRASH_PAGE = 0
"""Padding rows of a step write here and nothing reads it. Never handed out."""


@dataclasses.dataclass(frozen=True)
class AdapterPlacement:
    """Where an adapter's rows lie in its own pages, counted from its first page.

    Attributes:
        ranks: `target -> rank`.
        starts: `target -> (start of A, start of B)`, in elements from the adapter's first page.
        num_pages: pages the adapter takes.
    """

    ranks: dict[str, int]
    starts: dict[str, tuple[int, int]]
    num_pages: int

    @functools.cached_property
    def rank_of_targets(self) -> np.ndarray:
        """`[targets]` int32, 0 where the adapter lacks the target."""
        return np.array([self.ranks.get(t, 0) for t in TARGETS], np.int32)

    @functools.cached_property
    def num_targets(self) -> int:
        """How many of TARGETS, from the first on, hold all that the adapter has."""
        return 1 + max(TARGETS.index(t) for t in self.ranks)

    @functools.cached_property
    def start_of_runs(self) -> np.ndarray:
        """`[2 * targets]` int32: A's and B's start of each target in turn."""
        return np.array([self.starts.get(t, (0, 0)) for t in TARGETS], np.int32).ravel()


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedAdapter:
    """An adapter in the pool: its layout, and the ids of its pages in order."""

    placement: AdapterPlacement
    pages: Sequence[int]

    @functools.cached_property
    def table_row(self) -> np.ndarray:
        """`[2 * targets + num_pages]` int32: the starts of its runs, then its pages."""
        return np.concatenate([self.placement.start_of_runs, np.asarray(self.pages, np.int32)])


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Geometry of a page for one model."""

    config: LlamaConfig
    page_tokens: int

    @classmethod
    def for_model(cls, config: LlamaConfig, page_tokens: int = 16) -> PageLayout:
        """At least `page_tokens` tokens a page: more where the model's widest LoRA row would not fit one."""
        widest = max(max(config.target_shape(t)) for t in TARGETS)
        token_elems = 2 * config.num_kv_heads * config.head_dim
        while page_tokens * token_elems < widest:
            page_tokens *= 2
        return cls(config, page_tokens)

    @property
    def page_elems(self) -> int:
        return 2 * self.config.num_kv_heads * self.page_tokens * self.config.head_dim

    @functools.cached_property
    def row_unit(self) -> int:
        """Divides where any LoRA row begins in its page and how long it is, in elements; at most 16."""
        return math.gcd(16, *(width for target in TARGETS for width in self.config.target_shape(target)))

    def page_bytes(self, itemsize: int) -> int:
        """Bytes of a page over all layers; `itemsize` is the pool's dtype in bytes."""
        return self.page_elems * self.config.num_layers * itemsize

    def pages_for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def row_address(self, start: int, row: int, width: int) -> tuple[int, int]:
        """`(page, offset)` of a run's row, the run starting at element `start` and its rows being `width` long."""
        page, offset = divmod(start, self.page_elems)
        first = (self.page_elems - offset) // width
        if row < first:
            return page, offset + row * width
        page_step, slot = divmod(row - first, self.page_elems // width)
        return page + 1 + page_step, slot * width

    def place(self, ranks: dict[str, int]) -> AdapterPlacement:
        """Packs runs of rows back to back, in the order of TARGETS."""
        starts: dict[str, tuple[int, int]] = {}
        end = 0
        for target in TARGETS:
            if target not in ranks:
                continue
            pair = []
            for width in self.config.target_shape(target):
                if self.page_elems - end % self.page_elems < width:
                    end = math.ceil(end / self.page_elems) * self.page_elems
                pair.append(end)
                page, offset = self.row_address(end, ranks[target] - 1, width)
                end = page * self.page_elems + offset + width
            starts[target] = (pair[0], pair[1])
        return AdapterPlacement(dict(ranks), starts, self.pages_for_elems(end))

    def pages_for_elems(self, elems: int) -> int:
        return -(-elems // self.page_elems)

    def pack(self, weights: AdapterWeights, dtype: np.dtype) -> np.ndarray:
        """Packs an adapter: `[num_layers, num_pages, page_elems]`; rows a layer does not have are zero."""
        placement = self.place(weights.ranks)
        block = np.zeros((self.config.num_layers, placement.num_pages, self.page_elems), dtype)
        for (layer, target), (a, b) in weights.tensors.items():
            for start, rows in zip(placement.starts[target], (a, b.T)):
                for i, row in enumerate(rows):
                    page, offset = self.row_address(start, i, row.shape[0])
                    block[layer, page, offset : offset + row.shape[0]] = row
        return block
