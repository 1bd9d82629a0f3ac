"""Adapters in object stores, named by URL as s3://bucket/adapter and read through fsspec."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from chameleon_jax.checkpoints.peft_config import AdapterError

BLOCK_BYTES = 4 << 20
"""Bytes copied at a time."""

FETCH_TIMEOUT_S = 300.0
"""Seconds for an adapter's files. Half of a request's default deadline, so that the requests that wait for it learn the reason.
One of rank 512 on Llama-7B in bfloat16 has 2.6 GB, for which 9 MB/s suffice."""

MAX_FETCHES = 32
"""Fetches at once, those included that outlived their deadline: nothing can end a call of a store that hangs."""

_slots = threading.BoundedSemaphore(MAX_FETCHES)


class StoreError(AdapterError):
    """A remote adapter cannot be fetched, through no fault of its files."""


class MissingAdapter(AdapterError):
    """No adapter is at a URL, or none that may be read: stores that hide their names refuse both alike."""


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
        MissingAdapter: A remote file is missing.
        StoreError: A package is missing, or the store fails or takes longer than FETCH_TIMEOUT_S.
        AdapterError: A remote file is too large.
    """
    if not is_url(path):
        yield Path(path)
        return
    # a fetch that outlived its deadline may still write there
    with tempfile.TemporaryDirectory(prefix="chameleon-adapter-", ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary, Path(path).name)
        try:
            directory.mkdir()
            _fetch_in_time(str(path), directory, limits)
        except AdapterError:
            raise
        except ImportError as error:
            hint = "pip install 'chameleon-jax[remote]' installs what S3 and GCS need"
            raise StoreError(f"{path} cannot be fetched: {error}; {hint}") from error
        except (FileNotFoundError, PermissionError) as error:
            raise MissingAdapter(f"{path} cannot be fetched: {error!r}") from error
        except Exception as error:  # each store raises errors of its own
            raise StoreError(f"{path} cannot be fetched: {error!r}") from error
        yield directory


def _fetch_in_time(url: str, directory: Path, limits: Mapping[str, int]) -> None:
    """Copy files of a URL by a thread of its own, which is left behind at the deadline."""
    fetched: Future[None] = Future()
    late = threading.Event()

    def fetch() -> None:
        try:
            _fetch(url, directory, limits, late)
            fetched.set_result(None)
        except BaseException as error:
            fetched.set_exception(error)
        finally:
            _slots.release()

    end = time.monotonic() + FETCH_TIMEOUT_S
    if not _slots.acquire(timeout=FETCH_TIMEOUT_S):
        raise StoreError(f"{url} cannot be fetched: {MAX_FETCHES} fetches of others have not ended for {FETCH_TIMEOUT_S:g} s")
    threading.Thread(target=fetch, name="adapter-fetch", daemon=True).start()
    if wait([fetched], end - time.monotonic()).not_done:
        late.set()
        raise StoreError(f"{url} cannot be fetched: its store took longer than {FETCH_TIMEOUT_S:g} s")
    fetched.result()


def _fetch(url: str, directory: Path, limits: Mapping[str, int], late: threading.Event) -> None:
    import fsspec

    # a listing that is kept has a file's old size, at which its new content would be cut
    store, root = fsspec.url_to_fs(url, use_listings_cache=False)
    for name, limit in limits.items():
        with store.open(f"{root.rstrip('/')}/{name}", "rb") as source, (directory / name).open("wb") as target:
            if not _copy(source, target, limit, late):
                raise AdapterError(f"{name} of {url} has more bytes than are allowed: {limit}")


def _copy(source: Any, target: Any, limit: int, late: threading.Event) -> bool:
    """Copy a file, until it is late. Returns False, and stops, where it has more than `limit` bytes."""
    while not late.is_set() and (block := source.read(BLOCK_BYTES)):
        limit -= len(block)
        if limit < 0:
            return False
        target.write(block)
    return True
