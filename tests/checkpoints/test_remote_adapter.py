"""Adapters by URL, with fsspec's store in memory."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from chameleon_jax.checkpoints import peft, remote_adapter
from tests import reference_models as reference

CONFIG = reference.CONFIGS["gqa"]
FILES = (peft.CONFIG_FILE, peft.WEIGHTS_FILE)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Store with `bucket/a`; temporary files go to a folder of their own, which must be empty in the end."""
    memory = fsspec.filesystem("memory")
    put(memory, "/bucket/a", reference.save_adapter(tmp_path / "a", CONFIG, 2))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield memory
    memory.rm("/bucket", recursive=True)
    assert not list((tmp_path / "temporary").iterdir())


def put(memory, folder: str, directory: Path) -> None:
    for name in FILES:
        memory.pipe(f"{folder}/{name}", (directory / name).read_bytes())


def assert_same(found, expected) -> None:
    assert found.ranks == expected.ranks
    for key, pair in expected.tensors.items():
        for a, b in zip(found.tensors[key], pair):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("url", ["memory://bucket/a", "memory://bucket/a/"])
def test_a_url_is_read_like_a_directory(store, tmp_path, url):
    assert_same(peft.load(url, CONFIG), peft.load(tmp_path / "a", CONFIG))


def test_a_url_is_read_anew(store, tmp_path):
    peft.load("memory://bucket/a", CONFIG)
    put(store, "/bucket/a", reference.save_adapter(tmp_path / "b", CONFIG, 8, seed=1))
    assert_same(peft.load("memory://bucket/a", CONFIG), peft.load(tmp_path / "b", CONFIG))


def test_missing_files_and_unknown_schemes_are_named(store):
    with pytest.raises(peft.AdapterError, match="memory://bucket/b cannot be fetched: FileNotFoundError.*adapter_config.json"):
        peft.load("memory://bucket/b", CONFIG)
    store.mv(f"/bucket/a/{peft.WEIGHTS_FILE}", "/bucket/a/adapter_model.bin")  # pickled: not even fetched
    with pytest.raises(peft.AdapterError, match="cannot be fetched: FileNotFoundError.*adapter_model.safetensors"):
        peft.load("memory://bucket/a", CONFIG)
    with pytest.raises(peft.AdapterError, match="nostore://bucket/a cannot be fetched: ValueError.*Protocol not known"):
        peft.load("nostore://bucket/a", CONFIG)


class HungStore(MemoryFileSystem):
    """Store of which each call hangs until the test ends."""

    protocol = "hung"
    ends = threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("hung://", "memory://"))

    def open(self, *args, **kwargs):
        assert self.ends.wait(30)
        return super().open(*args, **kwargs)


@pytest.fixture
def hung(store, monkeypatch):
    fsspec.register_implementation("hung", HungStore)
    HungStore.ends.clear()
    yield
    HungStore.ends.set()
    for thread in threading.enumerate():
        if thread.name == "adapter-fetch":
            thread.join(30)


def test_a_store_that_hangs_is_left_at_the_deadline(hung, monkeypatch):
    monkeypatch.setattr(remote_adapter, "FETCH_TIMEOUT_S", 0.05)
    with pytest.raises(peft.AdapterError, match=r"hung://bucket/a cannot be fetched: its store took longer than 0\.05 s"):
        peft.load("hung://bucket/a", CONFIG)


def test_fetches_that_hang_are_bounded(hung, monkeypatch):
    monkeypatch.setattr(remote_adapter, "FETCH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(remote_adapter, "_slots", threading.BoundedSemaphore(2))
    for end in ("its store took", "its store took", ".* fetches of others have not ended", ".* fetches of others"):
        with pytest.raises(remote_adapter.StoreError, match=f"cannot be fetched: {end}"):
            peft.load("hung://bucket/a", CONFIG)
    HungStore.ends.set()
    monkeypatch.setattr(remote_adapter, "FETCH_TIMEOUT_S", 30.0)
    assert peft.load("hung://bucket/a", CONFIG).ranks  # the slots are free again


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_an_adapter_that_is_not_there_differs_from_a_store_that_fails(store, monkeypatch, error):
    """S3 refuses a name that is not there, where it may not be listed."""
    found = {}
    for kind in (error, ConnectionResetError):
        monkeypatch.setattr(type(store), "open", lambda *args, kind=kind, **kwargs: (_ for _ in ()).throw(kind("secret")))
        with pytest.raises(peft.AdapterError) as raised:
            peft.load("memory://bucket/a", CONFIG)
        found[kind] = raised.type
    monkeypatch.undo()
    assert found == {error: remote_adapter.MissingAdapter, ConnectionResetError: remote_adapter.StoreError}


@pytest.mark.parametrize("file, limit", [(peft.CONFIG_FILE, 1 << 20), (peft.WEIGHTS_FILE, 7 << 20)])
def test_larger_files_are_not_fetched_to_their_end(store, monkeypatch, file, limit):
    monkeypatch.setattr(peft, "_max_file_bytes", lambda config: 7 << 20)
    store.pipe(f"/bucket/a/{file}", bytes(limit + 1))
    with pytest.raises(peft.AdapterError, match=f"{file} of memory://bucket/a has more bytes than are allowed: {limit}"):
        peft.load("memory://bucket/a", CONFIG)


def test_a_broken_adapter_is_named_by_its_folder(store):
    store.pipe(f"/bucket/a/{peft.WEIGHTS_FILE}", b"x" * 64)
    with pytest.raises(peft.AdapterError, match="adapter_model.safetensors cannot be read"):
        peft.load("memory://bucket/a", CONFIG)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a", "s3fs"), ("gs://bucket/a", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        peft.AdapterError, match=rf"{url} cannot be fetched: .*{package}.*pip install 'chameleon-jax\[remote\]'"
    ):
        peft.load(url, CONFIG)
