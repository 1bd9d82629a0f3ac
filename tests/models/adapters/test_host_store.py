from __future__ import annotations

import contextlib
import logging
import stat
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters import host_store
from chameleon_jax.models.adapters.host_store import HostStore
from tests.properties import examples

BLOCK_BYTES = 2 * 3 * 8 * 4


def block(seed: int, dtype=np.float32) -> np.ndarray:
    """`[2 layers, 3 pages, 8 elements]`."""
    return np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(dtype)


@contextlib.contextmanager
def opened(byte_limit, directory=None):
    store = HostStore(byte_limit, directory, stage=lambda array: array)
    try:
        yield store
    finally:
        store.close()


def settle(store: HostStore, byte_limit: int) -> None:
    """Wait until the background thread has caught up."""
    deadline = time.monotonic() + 10
    while store.bytes_in_memory > byte_limit:
        assert time.monotonic() < deadline, "nothing was spilled"
        time.sleep(0.001)


@contextlib.contextmanager
def slow_disk(monkeypatch):
    """Hold back the writing of files until the given event is set."""
    started, go = threading.Event(), threading.Event()
    save_file = host_store.safetensors.numpy.save_file

    def wait(*arguments):
        started.set()
        assert go.wait(10)
        save_file(*arguments)

    monkeypatch.setattr(host_store.safetensors.numpy, "save_file", wait)
    try:
        yield started, go
    finally:
        go.set()


def test_in_memory_it_is_the_same_array_at_once():
    with opened(BLOCK_BYTES) as store:
        array = block(0)
        store.put("a", array)
        future = store.fetch("a")
        assert future.done() and future.result() is array
        assert store.bytes_in_memory == BLOCK_BYTES
        store.put("a", block(0))
        assert store.bytes_in_memory == BLOCK_BYTES


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_spilled_blocks_come_back_the_same(dtype, tmp_path):
    with opened(0, tmp_path) as store:
        store.put("a", block(0, dtype))
        store.put("b", block(1, dtype).transpose(2, 0, 1))
        settle(store, 0)
        a, b = store.fetch("a").result(10), store.fetch("b").result(10)
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(a, block(0, dtype))
        np.testing.assert_array_equal(b, block(1, dtype).transpose(2, 0, 1))


def test_the_least_recently_used_leaves():
    with opened(2 * BLOCK_BYTES) as store:
        store.put("a", block(0))
        store.put("b", block(1))
        store.fetch("a")
        store.put("c", block(2))
        settle(store, 2 * BLOCK_BYTES)
        in_memory = {name for name in "abc" if store.fetch(name).done()}
        assert in_memory == {"a", "c"}


def test_a_block_larger_than_the_limit_is_served():
    with opened(BLOCK_BYTES // 2) as store:
        store.put("a", block(0))
        settle(store, 0)
        for _ in range(2):
            np.testing.assert_array_equal(store.fetch("a").result(10), block(0))
        settle(store, 0)


def test_the_directory_is_private_and_removed(tmp_path):
    with opened(0, tmp_path / "spill") as store:
        store.put("../../a", block(0))
        settle(store, 0)
        [directory] = (tmp_path / "spill").iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [f.suffix for f in directory.iterdir()] == [".safetensors"]
    assert not list((tmp_path / "spill").iterdir())


def test_put_and_fetch_do_not_wait_for_the_disk(monkeypatch):
    with slow_disk(monkeypatch) as (started, go), opened(0) as store:
        store.put("a", block(0))
        assert started.wait(10)
        store.put("b", block(1))
        assert store.fetch("a").done() and store.fetch("b").done()
        assert store.bytes_in_memory == 2 * BLOCK_BYTES
        go.set()
        settle(store, 0)


def test_a_block_removed_while_it_is_written_leaves_no_file(monkeypatch, tmp_path):
    with slow_disk(monkeypatch) as (started, go), opened(0, tmp_path) as store:
        store.put("a", block(0))
        assert started.wait(10)
        store.remove("a")
        assert "a" not in store and store.bytes_in_memory == 0
        store.put("a", block(1))  # a new block of that name, while the old one is still being written
        go.set()
        settle(store, 0)
        np.testing.assert_array_equal(store.fetch("a").result(10), block(1))
        [directory] = tmp_path.iterdir()
        assert len(list(directory.iterdir())) == 1


def test_put_again_after_remove_keeps_its_own_file(monkeypatch):
    with opened(0) as store:
        store.put("a", block(0))
        settle(store, 0)
        with slow_disk(monkeypatch) as (started, go):
            store.put("b", block(1))
            assert started.wait(10)
            store.remove("a")
            store.put("a", block(2))  # spilled by the running pass, before the old file is removed
            go.set()
            settle(store, 0)
            np.testing.assert_array_equal(store.fetch("a").result(10), block(2))


def test_unknown_and_removed_blocks_are_key_errors():
    with opened(0) as store:
        store.put("a", block(0))
        settle(store, 0)
        store.remove("a")
        store.remove("a")
        for name in ("a", "b"):
            with pytest.raises(KeyError, match="host store"):
                store.fetch(name).result(10)


def test_a_full_disk_keeps_blocks_in_memory_and_says_so(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_store.safetensors.numpy, "save_file", full)
    with caplog.at_level(logging.WARNING), opened(0) as store:
        store.put("a", block(0))
        deadline = time.monotonic() + 10
        while "No space left" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.001)
        assert "adapter a stays in host memory" in caplog.text
        np.testing.assert_array_equal(store.fetch("a").result(10), block(0))


def test_a_lost_file_fails_the_fetch(tmp_path):
    with opened(0, tmp_path) as store:
        store.put("a", block(0))
        settle(store, 0)
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
        with pytest.raises(OSError):
            store.fetch("a").result(10)


def test_after_close_memory_is_served_and_the_disk_is_not():
    with opened(BLOCK_BYTES) as store:
        store.put("a", block(0))
        store.put("b", block(1))
        settle(store, BLOCK_BYTES)
    np.testing.assert_array_equal(store.fetch("b").result(), block(1))
    with pytest.raises(RuntimeError, match="closed"):
        store.fetch("a").result()
    with pytest.raises(RuntimeError, match="closed"):
        store.put("c", block(2))
    store.remove("a")
    store.close()


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="byte_limit is -1"):
        HostStore(-1, stage=lambda array: array)


def test_many_threads_put_and_fetch():
    with opened(3 * BLOCK_BYTES) as store:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    name = int(rng.integers(8))
                    store.put(str(name), block(name))
                    np.testing.assert_array_equal(store.fetch(str(name)).result(10), block(name))
            except BaseException as error:
                failures.append(error)

        failures: list[BaseException] = []
        threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        settle(store, 3 * BLOCK_BYTES)
        for name in range(8):
            if str(name) in store:
                np.testing.assert_array_equal(store.fetch(str(name)).result(10), block(name))


OPERATIONS = st.tuples(st.sampled_from(["put", "fetch", "remove", "settle"]), st.integers(0, 4))


@examples(50)
@given(limit=st.integers(0, 4), operations=st.lists(OPERATIONS, max_size=30))
def test_it_is_a_dictionary_within_its_limit(limit, operations):
    with opened(limit * BLOCK_BYTES) as store:
        present = set()
        for operation, seed in operations:
            name = str(seed)
            if operation == "put":
                store.put(name, block(seed))
                present.add(seed)
            elif operation == "remove":
                store.remove(name)
                present.discard(seed)
            elif operation == "settle":
                settle(store, limit * BLOCK_BYTES)
            elif seed in present:
                np.testing.assert_array_equal(store.fetch(name).result(10), block(seed))
            else:
                assert isinstance(store.fetch(name).exception(10), KeyError)
            assert (name in store) == (seed in present)
        settle(store, limit * BLOCK_BYTES)
        assert store.bytes_in_memory <= min(limit, len(present)) * BLOCK_BYTES
        for seed in present:
            np.testing.assert_array_equal(store.fetch(str(seed)).result(10), block(seed))


class Staged:
    """Result of `stage` in a test: a copy of the array in another form."""

    def __init__(self, array: np.ndarray):
        self._rows = [row.copy() for row in array]
        self.nbytes = array.nbytes

    def __array__(self, dtype=None, copy=None):
        return np.stack(self._rows)


@pytest.mark.parametrize("limit", [0, BLOCK_BYTES])
def test_blocks_are_staged_in_memory_and_plain_on_disk(limit, tmp_path):
    staged_on = []

    def stage(array):
        staged_on.append(threading.current_thread())
        return Staged(array)

    store = HostStore(limit, tmp_path, stage=stage)
    for name in range(2):
        store.put(str(name), Staged(block(name)))
    settle(store, limit)
    for file in tmp_path.rglob("*.safetensors"):
        assert list(host_store.safetensors.numpy.load_file(file)) == ["block"]
    for name in range(2):
        staged = store.fetch(str(name)).result(10)
        assert isinstance(staged, Staged)
        np.testing.assert_array_equal(np.asarray(staged), block(name))
    settle(store, limit)
    assert all(thread.name.startswith("host-store") for thread in staged_on) and staged_on
    store.close()


def test_a_block_that_cannot_be_staged_fails_its_fetch_alone(tmp_path):
    full = [True]

    def stage(array):
        if full[0]:
            raise MemoryError("no pinned memory")
        return Staged(array)

    store = HostStore(0, tmp_path, stage=stage)
    store.put("a", Staged(block(0)))
    settle(store, 0)
    with pytest.raises(MemoryError, match="pinned"):
        store.fetch("a").result(10)
    full[0] = False
    np.testing.assert_array_equal(np.asarray(store.fetch("a").result(10)), block(0))
    store.close()
