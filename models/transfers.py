"""How adapters travel to the device: cut into pieces that wait in pinned host memory, each of which is one transfer.

Pinned memory is what the device can read by itself. A load therefore copies nothing on the host and keeps no core busy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

LOAD_BYTES = 16 << 20
"""Bytes of a full piece, or a page's where that is more: small enough that loads share the link and a step waits little for
a piece to be written, large enough that a transfer's fixed cost does not show."""

MAX_TRANSFER_BYTES = 128 << 20
"""Pieces that were sent and are not yet written to their pages take no more of the device's memory, unless it is one piece."""


@dataclasses.dataclass(frozen=True)
class PieceSizes:
    """The sizes in which adapters are cut: powers of two, so that few programs write all of them and nothing is padded.

    Attributes:
        page_bytes: of a page over all layers.
        load_pages: pages of a full piece, a power of two; 0 where no adapters are served.
    """

    page_bytes: int
    load_pages: int

    @classmethod
    def fit(cls, page_bytes: int, max_adapter_pages: int) -> PieceSizes:
        """Full pieces of LOAD_BYTES at most, and no larger than the largest adapter; at least one page."""
        pages = min(max(1, LOAD_BYTES // page_bytes), max_adapter_pages)
        return cls(page_bytes, 1 << (pages.bit_length() - 1) if pages else 0)

    @property
    def all(self) -> tuple[int, ...]:
        """1, 2, 4 ... load_pages."""
        return tuple(1 << i for i in range(self.load_pages.bit_length()))

    def split(self, num_pages: int) -> list[int]:
        """Pages of each piece of an adapter: full ones, then a rest's powers of two, the largest first (5 = 4 + 1)."""
        full, rest = divmod(num_pages, self.load_pages)
        return [self.load_pages] * full + [size for size in reversed(self.all) if rest & size]

    @property
    def device_bytes(self) -> int:
        """Device memory that transfers can take: as much may wait for its write to be executed as may be on the way."""
        return 2 * max(MAX_TRANSFER_BYTES, self.load_pages * self.page_bytes) if self.load_pages else 0


@dataclasses.dataclass(frozen=True, eq=False)
class PinnedBlock:
    """A packed adapter `[layers, pages, page_elems]`, ready to be sent. `np.asarray` puts it together again.

    Attributes:
        pieces: `[layers, n, page_elems]` each, in the order of the pages.
    """

    pieces: tuple[jax.Array | np.ndarray, ...]

    @classmethod
    def stage(cls, block: np.ndarray, sizes: PieceSizes, memory: jax.sharding.Sharding | None) -> PinnedBlock:
        """Cuts a packed block and puts the pieces into `memory`; None leaves them in NumPy's.

        Nobody may write to `block` afterwards: on CPU a piece that is the whole block may share its memory. Otherwise the
        pieces are copies, finished on return, and `block` can be dropped.
        """
        ends = np.cumsum(sizes.split(block.shape[1]))
        pieces = [np.ascontiguousarray(piece) for piece in np.split(block, ends[:-1], axis=1)]
        if memory is None:
            return cls(tuple(pieces))
        return cls(tuple(jax.block_until_ready([jax.device_put(piece, memory) for piece in pieces])))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def num_pages(self) -> int:
        return sum(piece.shape[1] for piece in self.pieces)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if len(self.pieces) == 1:
            return np.array(self.pieces[0], dtype, copy=copy)
        if copy is False:
            raise ValueError("a block of several pieces cannot be an array without a copy")
        return np.concatenate([np.asarray(piece) for piece in self.pieces], axis=1, dtype=dtype)


def pinned_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """Host memory that the sharding's devices read by themselves; None where the platform has no such kind."""
    devices: Iterable[Any] = sharding.addressable_devices
    has_it = all("pinned_host" in {memory.kind for memory in device.addressable_memories()} for device in devices)
    return sharding.with_memory_kind("pinned_host") if has_it else None
