"""Packed adapters in host memory up to a limit, the rest on disk."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy


@dataclasses.dataclass
class _Block:
    """`array` is None when the block is on disk only; `file` is None when it is in memory only."""

    num_bytes: int
    array: np.ndarray | None
    file: Path | None = None


class HostStore:
    """Blocks `[layers, pages, page_elems]` by content hash. Thread-safe; disk is touched on one background thread only.

    The least recently used blocks leave memory once they are on disk. Blocks are never written to after `put`.

    Args:
        byte_limit: what blocks in memory may take together once the background thread has caught up.
        spill_directory: where blocks go; None: a private temporary directory, removed by `close`.
    """

    def __init__(self, byte_limit: int, spill_directory: Path | None = None):
        self._limit = byte_limit
        self._temporary = tempfile.TemporaryDirectory(prefix="chameleon-jax-") if spill_directory is None else None
        self._directory = Path(self._temporary.name) if self._temporary is not None else Path(spill_directory or "")
        self._blocks: OrderedDict[str, _Block] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="host-store")

    @property
    def bytes_in_memory(self) -> int:
        with self._lock:
            return self._in_memory()

    def __contains__(self, content_hash: str) -> bool:
        with self._lock:
            return content_hash in self._blocks

    def put(self, content_hash: str, block: np.ndarray) -> None:
        """Takes a block; the caller does not write to it any more."""
        with self._lock:
            self._blocks[content_hash] = _Block(block.nbytes, block)
            over = self._in_memory() > self._limit
        if over:
            self._disk.submit(self._spill)

    def fetch(self, content_hash: str) -> Future[np.ndarray]:
        """The block: done at once when it is in memory, otherwise when it was read. Fails with KeyError or OSError."""
        future: Future[np.ndarray] = Future()
        with self._lock:
            block = self._blocks.get(content_hash)
            if block is not None and block.array is not None:
                self._blocks.move_to_end(content_hash)
                future.set_result(block.array)
                return future
        if block is None:
            future.set_exception(KeyError(f"adapter {content_hash[:12]} is not in the host store"))
            return future
        return self._disk.submit(self._read, content_hash)

    def remove(self, content_hash: str) -> None:
        with self._lock:
            block = self._blocks.pop(content_hash, None)
        if block is not None and block.file is not None:
            self._disk.submit(block.file.unlink, missing_ok=True)

    def close(self) -> None:
        self._disk.shutdown(wait=True, cancel_futures=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _in_memory(self) -> int:
        return sum(block.num_bytes for block in self._blocks.values() if block.array is not None)

    def _spill(self) -> None:
        """Moves blocks to disk, least recently used first, until memory is under the limit (background thread)."""
        while True:
            with self._lock:
                if self._in_memory() <= self._limit:
                    return
                content_hash, block = next((h, b) for h, b in self._blocks.items() if b.array is not None)
                array, file = block.array, block.file
            if file is None:
                file = self._write(content_hash, array)
            with self._lock:
                block.array, block.file = None, file
                gone = self._blocks.get(content_hash) is not block
            if gone:
                file.unlink(missing_ok=True)

    def _write(self, content_hash: str, array: np.ndarray | None) -> Path:
        assert array is not None
        file = self._directory / f"{content_hash}.safetensors"
        partial = file.with_suffix(".partial")
        safetensors.numpy.save_file({"block": array}, partial)
        os.replace(partial, file)
        return file

    def _read(self, content_hash: str) -> np.ndarray:
        with self._lock:
            block = self._blocks.get(content_hash)
            if block is None:
                raise KeyError(f"adapter {content_hash[:12]} was removed while it was read")
            if block.array is not None:
                return block.array
            file = block.file
        assert file is not None
        array = safetensors.numpy.load_file(file)["block"]
        with self._lock:
            block.array = array
            if content_hash in self._blocks:
                self._blocks.move_to_end(content_hash)
        self._spill()
        return array
