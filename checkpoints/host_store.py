"""Packed adapters in host memory up to a limit, the rest on disk."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

logger = logging.getLogger(__name__)


class BlockState(enum.Enum):
    """Where a block is. MEMORY -> BOTH once written; BOTH -> DISK when memory is short; DISK -> BOTH once read."""

    MEMORY = enum.auto()
    BOTH = enum.auto()
    DISK = enum.auto()


@dataclasses.dataclass(eq=False)
class _Block:
    """`array` is held in MEMORY and BOTH, `file` in BOTH and DISK."""

    num_bytes: int
    array: np.ndarray | None
    file: Path | None = None

    @property
    def state(self) -> BlockState:
        if self.array is None:
            return BlockState.DISK
        return BlockState.MEMORY if self.file is None else BlockState.BOTH


class HostStore:
    """Blocks `[layers, pages, page_elems]` by content hash. Thread-safe; disk is touched on one background thread only.

    The least recently used blocks leave memory once they are on disk. Blocks are never written to after `put`.

    Args:
        byte_limit: what blocks in memory may take together once the background thread has caught up.
        spill_directory: where the store makes a private directory (0700) that `close` removes; None: among the system's
            temporary files.

    Raises:
        ValueError: byte_limit is negative.
    """

    def __init__(self, byte_limit: int, spill_directory: Path | None = None):
        if byte_limit < 0:
            raise ValueError(f"byte_limit is {byte_limit}; allowed: 0 or more")
        self._limit = byte_limit
        if spill_directory is not None:
            spill_directory.mkdir(parents=True, exist_ok=True)
        self._directory = tempfile.TemporaryDirectory(prefix="chameleon-jax-", dir=spill_directory)
        self._names = (Path(self._directory.name) / f"{i}.safetensors" for i in itertools.count())
        self._lock = threading.Lock()  # guards what follows
        self._blocks: dict[str, _Block] = {}
        self._in_memory: OrderedDict[str, _Block] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._closed = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="host-store")

    @property
    def bytes_in_memory(self) -> int:
        with self._lock:
            return self._bytes

    def __contains__(self, content_hash: str) -> bool:
        with self._lock:
            return content_hash in self._blocks

    def put(self, content_hash: str, block: np.ndarray) -> None:
        """Takes a block; the caller does not write to it any more. Raises RuntimeError after `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the host store is closed")
            # the same hash is the same content: what is on disk stays valid
            self._keep(content_hash, self._blocks.setdefault(content_hash, _Block(block.nbytes, None)), block)
            if self._bytes > self._limit:
                self._disk.submit(self._spill)

    def fetch(self, content_hash: str) -> Future[np.ndarray]:
        """The block: done at once when it is in memory, otherwise when it was read.

        Fails with KeyError where the block is not (or no longer) there, OSError or SafetensorError where it cannot be
        read, RuntimeError where the store was closed before it was.
        """
        future: Future[np.ndarray] = Future()
        with self._lock:
            block = self._blocks.get(content_hash)
            if block is None:
                future.set_exception(KeyError(f"adapter {content_hash[:12]} is not in the host store"))
            elif block.array is not None:
                self._in_memory.move_to_end(content_hash)
                future.set_result(block.array)
            elif self._closed:
                future.set_exception(RuntimeError("the host store is closed"))
            else:
                self._disk.submit(self._read, content_hash, block, future)
        return future

    def remove(self, content_hash: str) -> None:
        with self._lock:
            block = self._blocks.pop(content_hash, None)
            if block is None:
                return
            if block.array is not None:
                del self._in_memory[content_hash]
                self._bytes -= block.num_bytes
            if block.file is not None and not self._closed:
                self._disk.submit(block.file.unlink, missing_ok=True)

    def close(self) -> None:
        """Ends the background thread and removes the files. What is in memory can still be fetched."""
        with self._lock:
            self._closed = True
        self._disk.shutdown(wait=True)
        self._directory.cleanup()

    def _keep(self, content_hash: str, block: _Block, array: np.ndarray) -> None:
        """Counts a block as in memory and as the last used; the lock is held."""
        if block.array is None:
            block.array = array
            self._bytes += block.num_bytes
        self._in_memory[content_hash] = block
        self._in_memory.move_to_end(content_hash)

    def _spill(self) -> None:
        """Takes blocks out of memory, least recently used first, until it is under the limit (background thread)."""
        while True:
            with self._lock:
                if self._closed or self._bytes <= self._limit:
                    return
                content_hash, block = next(iter(self._in_memory.items()))
                array = block.array
                assert array is not None
                if block.state is BlockState.BOTH:
                    block.array = None
                    del self._in_memory[content_hash]
                    self._bytes -= block.num_bytes
                    continue
            try:
                file = self._write(array)
            except (OSError, safetensors.SafetensorError) as error:
                logger.warning("adapter %s stays in host memory: it cannot be spilled: %s", content_hash[:12], error)
                return
            with self._lock:
                block.file = file
                removed = self._blocks.get(content_hash) is not block
            if removed:
                file.unlink()

    def _write(self, array: np.ndarray) -> Path:
        file = next(self._names)  # a name is used once, so removing a block cannot take the file of a newer one
        partial = file.with_suffix(".partial")
        try:
            safetensors.numpy.save_file({"block": np.ascontiguousarray(array)}, partial)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        return file

    def _read(self, content_hash: str, block: _Block, future: Future[np.ndarray]) -> None:
        """Ends a fetch from disk (background thread)."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._read_block(content_hash, block))
        except Exception as error:  # whatever it is, it belongs to whoever waits for the block
            future.set_exception(error)
        self._spill()

    def _read_block(self, content_hash: str, block: _Block) -> np.ndarray:
        with self._lock:
            if self._closed:
                raise RuntimeError("the host store is closed")
            if self._blocks.get(content_hash) is not block:
                raise KeyError(f"adapter {content_hash[:12]} was removed before it was read")
            if block.array is not None:  # read for an earlier fetch
                self._in_memory.move_to_end(content_hash)
                return block.array
            file = block.file
        assert file is not None
        array = safetensors.numpy.load_file(file)["block"]
        with self._lock:
            if self._blocks.get(content_hash) is block:
                self._keep(content_hash, block, array)
        return array
