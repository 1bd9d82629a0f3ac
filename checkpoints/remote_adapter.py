"""Adapters in object stores, named by URL as s3://bucket/adapter and read through fsspec."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.checkpoints.peft_config import AdapterError

BLOCK_BYTES = 4 << 20
"""Bytes copied at a time."""


def is_url(path: str | Path) -> bool:
    """Whether an adapter's path has a scheme. A `Path` has none, as it turns // into /."""
    return isinstance(path, str) and "://" in path


@contextlib.contextmanager
def local_directory(path: str | Path, limits: Mapping[str, int]) -> Iterator[Path]:
    """Directory of an adapter: its own, or one with copies of a remote adapter's files, which ends with the context.

    They are copied anew each time, as not every store tells whether a file has changed.

    Args:
        path: Directory, or URL of a folder.
        limits: Names of the files to copy, and the most bytes of each.

    Raises:
        AdapterError: A package is missing, or a remote file is missing, too large or unreadable.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="chameleon-adapter-") as temporary:
        directory = Path(temporary, Path(path).name)
        try:
            directory.mkdir()
            _fetch(str(path), directory, limits)
        except AdapterError:
            raise
        except ImportError as error:
            hint = "pip install 'chameleon-jax[remote]' installs what S3 and GCS need"
            raise AdapterError(f"{path} cannot be fetched: {error}; {hint}") from error
        except Exception as error:  # each store raises errors of its own
            raise AdapterError(f"{path} cannot be fetched: {error!r}") from error
        yield directory


def _fetch(url: str, directory: Path, limits: Mapping[str, int]) -> None:
    import fsspec

    # a listing that is kept has a file's old size, at which its new content would be cut
    store, root = fsspec.url_to_fs(url, use_listings_cache=False)
    for name, limit in limits.items():
        with store.open(f"{root.rstrip('/')}/{name}", "rb") as source, (directory / name).open("wb") as target:
            if not _copy(source, target, limit):
                raise AdapterError(f"{name} of {url} has more bytes than are allowed: {limit}")


def _copy(source: Any, target: Any, limit: int) -> bool:
    """Copy a file. Returns False, and stops, where it has more than `limit` bytes."""
    while block := source.read(BLOCK_BYTES):
        limit -= len(block)
        if limit < 0:
            return False
        target.write(block)
    return True
