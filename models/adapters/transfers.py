"""Transfers of adapters to the device, in pieces that wait in pinned host memory. Each piece is one transfer.

The device can read pinned memory by itself. A load therefore copies nothing on the host and keeps no core busy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

LOAD_BYTES = 16 << 20
"""Bytes of a full piece; a piece is one page at least, however large. A step's inputs may find a piece before them on the link.
That is 0.3 to 0.7 ms at 55 to 25 GB/s, and four times as much with 64 MiB. Larger pieces would save little: a transfer's fixed
cost, 10 to 20 us, is 2 to 6 % of this one, and a piece is written by one launch whatever its size (`ops/write_pages.py`)."""

MIN_TRANSFER_BYTES = 128 << 20
"""Bytes for pieces on small devices, and on devices of unknown size."""
MAX_TRANSFER_BYTES = 1 << 30
"""Bytes for pieces on large devices."""
TRANSFER_SHARE = 1 / 64
"""Share of JAX's device memory for pieces that were sent and are not yet written to their pages, within those bounds. A piece
is held for three steps (`models/runtime/link_pace.py`). At 14 ms a step and half of 50 GB/s that is 1 GB, so 1 GiB of an 80 GB
card. A 24 GB card gives 345 MB."""


def transfer_bytes(device_memory: int) -> int:
    """Compute the bytes that pieces may take of `device_memory` bytes; 0 stands for an unknown size, as on CPU."""
    return min(MAX_TRANSFER_BYTES, max(MIN_TRANSFER_BYTES, int(device_memory * TRANSFER_SHARE)))


@dataclasses.dataclass(frozen=True)
class PieceSizes:
    """Sizes in which adapters are cut: powers of two, so that few programs write all of them and nothing is padded.

    Attributes:
        page_bytes: Bytes of a page over all layers.
        load_pages: Pages of a full piece, a power of two. 0: no adapters are served.
        max_bytes: Device memory that pieces may take, from their sending until their write was executed.
    """

    page_bytes: int
    load_pages: int
    max_bytes: int = MIN_TRANSFER_BYTES

    @classmethod
    def fit(cls, page_bytes: int, max_adapter_pages: int, device_memory: int = 0) -> PieceSizes:
        """Choose full pieces of LOAD_BYTES at most, no larger than the largest adapter, of at least one page.

        Args:
            page_bytes: Bytes of a page over all layers.
            max_adapter_pages: Pages of the largest adapter. 0: no adapters are served.
            device_memory: Bytes that JAX may use of the device. 0: not known.
        """
        pages = min(max(1, LOAD_BYTES // page_bytes), max_adapter_pages)
        return cls(page_bytes, 1 << (pages.bit_length() - 1) if pages else 0, transfer_bytes(device_memory))

    @property
    def all(self) -> tuple[int, ...]:
        """Every size of a piece, in pages: 1, 2, 4 ... load_pages."""
        return tuple(1 << i for i in range(self.load_pages.bit_length()))

    def split(self, num_pages: int) -> list[int]:
        """Cut an adapter into pieces, in pages: full ones, then the rest's powers of two, the largest first (5 = 4 + 1)."""
        full, rest = divmod(num_pages, self.load_pages)
        return [self.load_pages] * full + [size for size in reversed(self.all) if rest & size]

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory to reserve for transfers: `max_bytes`, or one piece where that is more."""
        return max(self.max_bytes, self.load_pages * self.page_bytes) if self.load_pages else 0


@dataclasses.dataclass(frozen=True, eq=False)
class PinnedBlock:
    """Packed adapter, ready to be sent. `np.asarray` puts it together again, `[layers, pages, page_elems]`.

    Attributes:
        pieces: Parts of the adapter in the order of its pages.
    """

    pieces: tuple[Float[Array | np.ndarray, "layers _ page_elems"], ...]

    @classmethod
    def stage(
        cls, block: Float[np.ndarray, "layers pages page_elems"], sizes: PieceSizes, memory: jax.sharding.Sharding | None
    ) -> PinnedBlock:
        """Cut a packed block and put the pieces into `memory`; None leaves them in NumPy's.

        The caller must not write to `block` afterwards: on CPU a piece that is the whole block may share its memory. Otherwise
        the pieces are copies, finished on return, and `block` can be dropped.
        """
        ends = np.cumsum(sizes.split(block.shape[1]))
        pieces = [np.ascontiguousarray(piece) for piece in np.split(block, ends[:-1], axis=1)]
        if memory is None:
            return cls(tuple(pieces))
        return cls(tuple(jax.block_until_ready([jax.device_put(piece, memory) for piece in pieces])))

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def num_pages(self) -> int:
        """Pages of the adapter."""
        return sum(piece.shape[1] for piece in self.pieces)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if len(self.pieces) == 1:
            return np.array(self.pieces[0], dtype, copy=copy)
        if copy is False:
            raise ValueError("a block of several pieces cannot be an array without a copy")
        return np.concatenate([np.asarray(piece) for piece in self.pieces], axis=1, dtype=dtype)


def pinned_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """Find the host memory that the sharding's devices read by themselves; None where the platform has no such kind."""
    devices: Iterable[Any] = sharding.addressable_devices
    has_it = all("pinned_host" in {memory.kind for memory in device.addressable_memories()} for device in devices)
    return sharding.with_memory_kind("pinned_host") if has_it else None


def measure_link(piece: Shaped[Array | np.ndarray, "..."], memory: jax.sharding.Sharding, clock: Callable[[], float]) -> float:
    """Measure the bytes a second at which staged pieces reach `memory` of an idle device.

    Four transfers go at a time, so that their fixed cost shows as little as when adapters load. The best of four attempts
    counts, as the first one also makes the memory ready.
    """
    seconds = []
    for _ in range(4):
        begin = clock()
        jax.block_until_ready([jax.device_put(piece, memory) for _ in range(4)])
        seconds.append(clock() - begin)
    return 4 * piece.nbytes / max(min(seconds), 1e-9)
