"""Packed adapters in host memory up to a limit, the rest on disk.

A block in memory is the result of `stage`, in memory that transfers start from. On disk it is the packed array.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy

from chameleon_jax.checks import require
from chameleon_jax.models.adapters.transfers import PinnedBlock

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Entry:
    """A block in memory, on disk, or both: it has both once it was written or read, and loses `block` when memory is short."""

    num_bytes: int
    block: PinnedBlock | None = None
    file: Path | None = None


class HostStore:
    """Blocks by content hash. Thread-safe; disk is touched on one background thread only.

    The least recently used blocks leave memory once they are on disk. Blocks are never written to after `put`.

    Args:
        byte_limit: Bytes that blocks in memory may take together once the background thread has caught up.
        spill_directory: Parent of the store's private directory (0700), which `close` removes; None is the system's place for
            temporary files.
        stage: Turns a packed array `[layers, pages, page_elems]` into the block that is held in memory, of as many bytes. For
            blocks that were read it runs on the background thread. The array is not kept beside the block.

    Raises:
        ValueError: byte_limit is negative.
    """

    def __init__(self, byte_limit: int, spill_directory: Path | None = None, *, stage: Callable[[np.ndarray], PinnedBlock]):
        require(byte_limit >= 0, "byte_limit", byte_limit, "0 or more")
        self._limit = byte_limit
        self._stage = stage
        if spill_directory is not None:
            spill_directory.mkdir(parents=True, exist_ok=True)
        self._directory = tempfile.TemporaryDirectory(prefix="chameleon-jax-", dir=spill_directory)
        self._names = (Path(self._directory.name) / f"{i}.safetensors" for i in itertools.count())
        self._lock = threading.Lock()  # guards the fields below
        self._entries: dict[str, _Entry] = {}
        self._in_memory: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._num_spills = 0
        self._closed = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="host-store")

    def restart(self, byte_limit: int) -> None:
        """Count spills from 0 with another limit, and keep every block. A lower limit spills at once."""
        with self._lock:
            self._limit, self._num_spills = byte_limit, 0
            if self._bytes > byte_limit:
                self._disk.submit(self._spill)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes that blocks in memory take now."""
        with self._lock:
            return self._bytes

    @property
    def num_spills(self) -> int:
        """Blocks that left memory since the store was made."""
        with self._lock:
            return self._num_spills

    def __contains__(self, content_hash: str) -> bool:
        with self._lock:
            return content_hash in self._entries

    def put(self, content_hash: str, block: PinnedBlock) -> None:
        """Take a block that `stage` made. It must not change afterwards. Raises RuntimeError after `close`."""
        with self._lock:
            self._check_open()
            self._keep(content_hash, self._entries.setdefault(content_hash, _Entry(block.nbytes)), block)
            if self._bytes > self._limit:
                self._disk.submit(self._spill)

    def fetch(self, content_hash: str) -> Future[PinnedBlock]:
        """Fetch a block. The future is done at once where the block is in memory, else when it was read.

        The future fails with KeyError where the store has no such block (any more), OSError or SafetensorError where it cannot
        be read, RuntimeError where the store was closed before it was read.
        """
        future: Future[PinnedBlock] = Future()
        with self._lock:
            entry = self._entries.get(content_hash)
            if entry is None:
                future.set_exception(KeyError(f"adapter {content_hash[:12]} is not in the host store"))
            elif entry.block is not None:
                self._in_memory.move_to_end(content_hash)
                future.set_result(entry.block)
            elif self._closed:
                future.set_exception(RuntimeError("the host store is closed"))
            else:
                self._disk.submit(self._read, content_hash, entry, future)
        return future

    def remove(self, content_hash: str) -> None:
        """Drop a block, in memory and on disk; nothing where there is none."""
        with self._lock:
            entry = self._entries.pop(content_hash, None)
            if entry is None:
                return
            if entry.block is not None:
                del self._in_memory[content_hash]
                self._bytes -= entry.num_bytes
            if entry.file is not None and not self._closed:
                self._disk.submit(entry.file.unlink, missing_ok=True)

    def close(self) -> None:
        """End the background thread and remove the files. Blocks in memory can still be fetched."""
        with self._lock:
            self._closed = True
        self._disk.shutdown(wait=True)
        self._directory.cleanup()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the host store is closed")

    def _keep(self, content_hash: str, entry: _Entry, block: PinnedBlock) -> None:
        """Count a block as in memory and as the last used; the lock is held. Its file on disk stays valid."""
        if entry.block is None:
            entry.block = block
            self._bytes += entry.num_bytes
        self._in_memory[content_hash] = entry
        self._in_memory.move_to_end(content_hash)

    def _spill(self) -> None:
        """Take blocks out of memory, least recently used first, until it is under the limit (background thread)."""
        while True:
            with self._lock:
                if self._closed or self._bytes <= self._limit:
                    return
                content_hash, entry = next(iter(self._in_memory.items()))
                block = entry.block
                assert block is not None
                if entry.file is not None:
                    entry.block = None
                    del self._in_memory[content_hash]
                    self._bytes -= entry.num_bytes
                    self._num_spills += 1
                    continue
            try:
                file = self._write(np.asarray(block))
            except Exception as error:  # a full disk, or no memory for the copy that is written
                logger.warning("adapter %s stays in host memory: it cannot be spilled: %s", content_hash[:12], error)
                return
            with self._lock:
                entry.file = file
                removed = self._entries.get(content_hash) is not entry
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

    def _read(self, content_hash: str, entry: _Entry, future: Future[PinnedBlock]) -> None:
        """End a fetch from disk (background thread)."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._read_block(content_hash, entry))
        except Exception as error:  # any error is one for the reader of the future
            future.set_exception(error)
        self._spill()

    def _read_block(self, content_hash: str, entry: _Entry) -> PinnedBlock:
        with self._lock:
            self._check_open()
            if self._entries.get(content_hash) is not entry:
                raise KeyError(f"adapter {content_hash[:12]} was removed before it was read")
            if entry.block is not None:  # read for an earlier fetch
                self._in_memory.move_to_end(content_hash)
                return entry.block
            file = entry.file
        assert file is not None
        block = self._stage(safetensors.numpy.load_file(file)["block"])
        with self._lock:
            if self._entries.get(content_hash) is entry:
                self._keep(content_hash, entry, block)
        return block
