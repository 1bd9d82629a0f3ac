"""Adapters are cut, staged and written to the pool's pages without a byte more or less."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.executor import LoadResult
from chameleon_jax.models import llama
from chameleon_jax.models.adapters import transfers
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.adapters.transfers import PieceSizes, PinnedBlock, measure_link, pinned_memory
from chameleon_jax.models.config import PRESETS
from chameleon_jax.models.page_layout import TRASH_PAGE, PageLayout
from chameleon_jax.models.runtime.adapter_loads import AdapterLoads
from chameleon_jax.models.runtime.buckets import StepBuckets
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.serving.telemetry.compilations import Compilations

LAYOUT = PageLayout.for_model(dataclasses.replace(PRESETS["tiny"], num_layers=2))
PAGE_BYTES = LAYOUT.page_bytes(4)
NUM_PAGES = 64
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def block(num_pages: int, seed: int = 0) -> np.ndarray:
    shape = (LAYOUT.config.num_layers, num_pages, LAYOUT.page_elems)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_engine(monkeypatch, load_pages: int) -> ModelRunner:
    monkeypatch.setattr(transfers, "LOAD_BYTES", load_pages * PAGE_BYTES)
    dtype = jnp.dtype("float32")
    model = llama.random_model(LAYOUT.config, dtype, 0)
    shapes = StepBuckets(
        max_num_seqs=1, max_prefill_tokens=32, table_width=4, max_rank=4, max_adapter_pages=32, prefill_tile=32
    )
    return ModelRunner(model, LAYOUT, shapes, NUM_PAGES, dtype, compile_programs="lazy")


@pytest.mark.parametrize("load_pages", [1, 2, 8, 64])
def test_every_number_of_pages_is_cut_exactly(load_pages):
    sizes = PieceSizes(PAGE_BYTES, load_pages)
    for num_pages in range(1, 3 * load_pages + 5):
        split = sizes.split(num_pages)
        assert sum(split) == num_pages and set(split) <= set(sizes.all)
        assert split == sorted(split, reverse=True)
        rest = [size for size in split if size < load_pages]
        assert len(split) - len(rest) == num_pages // load_pages and len(rest) == len(set(rest))


@pytest.mark.parametrize(
    "page_bytes,max_adapter_pages,load_pages",
    [
        (transfers.LOAD_BYTES // 8, 100, 8),
        (transfers.LOAD_BYTES // 7, 100, 4),  # rounded down to a power of two
        (transfers.LOAD_BYTES // 8, 5, 4),  # nor larger than any adapter
        (3 * transfers.LOAD_BYTES, 100, 1),
        (1000, 0, 0),
    ],
)
def test_a_full_piece_has_load_bytes_at_most(page_bytes, max_adapter_pages, load_pages):
    sizes = PieceSizes.fit(page_bytes, max_adapter_pages)
    assert sizes.load_pages == load_pages
    assert sizes.all == tuple(n for n in (1, 2, 4, 8) if n <= load_pages)
    assert sizes.device_bytes == (max(transfers.MIN_TRANSFER_BYTES, load_pages * page_bytes) if load_pages else 0)


@pytest.mark.parametrize(
    "device_memory,reserved",
    [(0, 128 << 20), (int(7.2e9), 128 << 20), (int(21.6e9), 337_500_000), (72 << 30, 1 << 30), (127 << 30, 1 << 30)],
    ids=["unknown", "8 GB", "24 GB", "80 GB", "141 GB"],
)
def test_transfers_take_a_small_share_of_the_device(device_memory, reserved):
    assert PieceSizes.fit(1 << 20, 100, device_memory).device_bytes == reserved
    assert PieceSizes.fit(1 << 20, 0, device_memory).device_bytes == 0


def test_the_fastest_attempt_gives_the_rate_of_the_link():
    seconds = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    piece = np.zeros(1000, np.uint8)
    assert measure_link(piece, DEVICE, lambda: next(seconds)) == 4 * 1000 / 1.0


def test_an_engine_knows_its_links_rate(monkeypatch):
    assert make_engine(monkeypatch, 4).link_rate > 1e6


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("num_pages", [1, 4, 7, 9])
def test_a_staged_block_is_the_same_bytes(num_pages, dtype, pinned):
    array = block(num_pages).astype(dtype)
    expected, sizes = array.copy(), PieceSizes(PAGE_BYTES, 4)
    memory = pinned_memory(DEVICE) if pinned else None
    staged = PinnedBlock.stage(array, sizes, memory)
    assert [piece.shape[1] for piece in staged.pieces] == sizes.split(num_pages)
    assert staged.nbytes == array.nbytes and staged.num_pages == num_pages
    together = np.asarray(staged)
    assert together.dtype == dtype
    np.testing.assert_array_equal(together, expected)
    if memory is not None:
        assert {piece.sharding.memory_kind for piece in staged.pieces} == {"pinned_host"}  # type: ignore[union-attr]
    if len(staged.pieces) > 1:  # pieces are copies; where there is one, it may be the block itself
        array[:] = 0
        np.testing.assert_array_equal(np.asarray(staged), expected)


def test_adapters_load_without_pinned_memory(monkeypatch):
    class Device:
        def addressable_memories(self):
            return [dataclasses.make_dataclass("Memory", ["kind"])("device")]

    class Sharding:
        addressable_devices = (Device(),)

    assert pinned_memory(Sharding()) is None  # type: ignore[arg-type]
    engine = make_engine(monkeypatch, 4)
    engine._host_memory = None
    check_loads(engine)


@pytest.mark.parametrize("load_pages", [1, 4, 32])
def test_every_page_holds_its_part_of_the_packed_adapter(monkeypatch, load_pages):
    engine = make_engine(monkeypatch, load_pages)
    assert engine.pieces.load_pages == load_pages
    check_loads(engine)


def check_loads(engine: ModelRunner) -> None:
    """Load adapters of many sizes, several at a time and in scattered pages, over the pages of earlier ones."""
    rng = np.random.default_rng(engine.pieces.load_pages)
    store = HostStore(1 << 30, stage=engine.stage)
    loads = AdapterLoads(engine, store)
    expected = {page: np.zeros((LAYOUT.config.num_layers, LAYOUT.page_elems), np.float32) for page in range(NUM_PAGES)}
    ended: list[LoadResult] = []
    for turn in range(6):
        free = rng.permutation(np.arange(1, NUM_PAGES)).tolist()
        for i in range(3):
            name, size = f"{turn}.{i}", int(rng.integers(1, 21))
            pages, free = free[:size], free[size:]
            array = block(size, seed=10 * turn + i)
            expected |= {page: array[:, j].copy() for j, page in enumerate(pages)}
            store.put(name, engine.stage(array))
            loads.begin(name, pages)
            if turn % 2:
                loads.send_beside_step()
        while len(loads):
            ended += loads.poll(wait=True)
        for page, content in expected.items():
            np.testing.assert_array_equal(engine.read_page(page), content)
    assert TRASH_PAGE not in {page for page, content in expected.items() if content.any()}
    assert len(ended) == 18 and all(result.error is None and result.seconds > 0 for result in ended)
    store.close()


def test_a_block_from_disk_is_staged_again(monkeypatch, tmp_path):
    engine = make_engine(monkeypatch, 4)
    store = HostStore(0, tmp_path, stage=engine.stage)
    array = block(7)
    store.put("a", engine.stage(array.copy()))
    while store.bytes_in_memory:
        pass
    staged = store.fetch("a").result(10)
    assert [piece.shape[1] for piece in staged.pieces] == [4, 2, 1]
    assert {piece.sharding.memory_kind for piece in staged.pieces} == {"pinned_host"}  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(staged), array)
    store.close()


def test_loads_compile_nothing(monkeypatch):
    engine = make_engine(monkeypatch, 4)
    for size in engine.pieces.all:
        assert engine.programs.write[size]
    with contextlib.closing(Compilations()) as compilations:
        staged = engine.stage(block(7))
        first = 1
        for piece in staged.pieces:
            engine.write_adapter(engine.put(piece), range(first, first + piece.shape[1])).block_until_ready()
            first += piece.shape[1]
    assert compilations.at_start == 0
