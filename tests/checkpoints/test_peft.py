from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.checkpoints import peft
from chameleon_jax.models.config import TARGETS
from tests.checkpoints.peft_samples import CONFIG, NULLS, PREFIX, Q0, change_tensors, matrices, write
from tests.properties import examples


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_folds_the_scale_into_b(dtype, tmp_path):
    tensors = matrices(targets=TARGETS)
    peft.save(tmp_path, tensors, alpha=6, base_model="base", dtype=dtype)
    loaded = peft.load(tmp_path, CONFIG).tensors
    assert loaded.keys() == tensors.keys()
    for where, (a, b) in tensors.items():
        np.testing.assert_array_equal(loaded[where][0], a.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(loaded[where][1], b.astype(dtype).astype(np.float32) * np.float32(1.5))
        assert loaded[where][1].dtype == np.float32


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8_is_widened(dtype, tmp_path):
    tensors = matrices()
    peft.save(tmp_path, tensors, alpha=4, base_model="base", dtype=getattr(ml_dtypes, dtype))
    loaded = peft.load(tmp_path, CONFIG).tensors
    for where, (a, b) in tensors.items():
        for got, matrix in zip(loaded[where], (a, b)):
            np.testing.assert_array_equal(got, matrix.astype(dtype).astype(np.float32))


def test_save_wants_one_rank(tmp_path):
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        peft.save(tmp_path, matrices(4, layers=[0]) | matrices(2, layers=[1]), alpha=8, base_model="base")


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


ZEROS = np.zeros((4, 64), np.float32)
TENSOR_REFUSALS = {
    "embedding": (_set("base_model.model.model.embed_tokens.lora_embedding_A", ZEROS), "embed_tokens"),
    "lm_head": (_set("base_model.model.lm_head.lora_A.weight", ZEROS), "lm_head"),
    "whole module": (_set("base_model.model.lm_head.weight", ZEROS), "lm_head"),
    "dora": (_set(f"{Q0}.lora_magnitude_vector", ZEROS[0]), "q_proj has a magnitude, but use_dora is False"),
    "bias": (_set(f"{Q0}.lora_B.bias", ZEROS[0]), "q_proj has a bias, but lora_bias is False"),
    "bias of the base model": (_set(f"{Q0}.base_layer.bias", ZEROS[0]), "base_layer.bias is not served; allowed of q_proj"),
    "dora of lm_head": (_set("base_model.model.lm_head.lora_magnitude_vector", ZEROS[0]), "is not served; allowed of lm_head"),
    "tokens without ids": (
        _set("base_model.model.lm_head.token_adapter.trainable_tokens_delta", ZEROS),
        "lm_head has rows of trained tokens, and trainable_token_indices does not name them",
    ),
    "other target": (_set(f"{PREFIX}.0.self_attn.qkv_proj.lora_A.weight", ZEROS), "qkv_proj"),
    "wrong parent": (_set(f"{PREFIX}.0.mlp.v_proj.lora_A.weight", ZEROS), "wrong place"),
    "twice": (_set(f"{Q0}.lora_A.default.weight", ZEROS), "twice"),
    "no A": (lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"), "no lora_A"),
    "no B": (lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"), "no lora_B"),
    "nothing": (lambda tensors: tensors.clear(), "adapts no matrix"),
    "another base": (_set(f"{Q0}.lora_A.weight", np.zeros((4, 65), np.float32)), "needs"),
    "another rank": (_set(f"{Q0}.lora_A.weight", np.zeros((5, 64), np.float32)), "rank 4"),
    "not a matrix": (_set(f"{Q0}.lora_A.weight", np.zeros(4, np.float32)), "rank 4"),
    "no number": (_set(f"{Q0}.lora_A.weight", np.full((4, 64), np.nan, np.float32)), "NaN"),
    "infinity": (_set(f"{Q0}.lora_B.weight", np.full((64, 4), np.inf, np.float16)), "infinity"),
    "integers": (_set(f"{Q0}.lora_A.weight", np.zeros((4, 64), np.int8)), "dtype I8; allowed: F16, BF16, F32"),
    "booleans": (_set(f"{Q0}.lora_A.weight", np.zeros((4, 64), bool)), "dtype BOOL"),
    "complex": (_set(f"{Q0}.lora_A.weight", np.zeros((4, 64), np.complex64)), "dtype C64"),
    "scales of float8": (_set(f"{Q0}.lora_A.weight", np.zeros((4, 64), ml_dtypes.float8_e8m0fnu)), "dtype F8_E8M0"),
    "NaN in float8": (_set(f"{Q0}.lora_A.weight", np.full((4, 64), np.nan, ml_dtypes.float8_e5m2)), "NaN"),
    "resized head": (
        _set("base_model.model.lm_head.weight", np.zeros((300, 64), np.float16)),
        "of 300; the base model has 256",
    ),
    "resized embedding": (
        _set("base_model.model.model.embed_tokens.base_layer.weight", np.zeros((300, 64), np.float16)),
        "embed_tokens is for a vocabulary of 300; the base model has 256.*merge the adapter",
    ),
    "resized vocabulary, adapted": (
        _set("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 300), np.float32)),
        "embed_tokens is for a vocabulary of 300; the base model has 256",
    ),
    "embedding of another width": (
        _set("base_model.model.model.embed_tokens.weight", np.zeros((256, 32), np.float32)),
        r"embed_tokens: the shape of its rows is \[256, 32\]; allowed: \[256, 64\]",
    ),
    "embedding without numbers": (
        _set("base_model.model.model.embed_tokens.weight", np.full((256, 64), np.nan, np.float32)),
        "embed_tokens: its rows hold NaN",
    ),
    "layer": (
        lambda tensors: [tensors.__setitem__(n.replace("layers.2", "layers.3"), tensors.pop(n)) for n in list(tensors)],
        "layers 0 to 2",
    ),
}


@pytest.mark.parametrize("name", TENSOR_REFUSALS)
def test_tensors_that_are_refused(name, tmp_path):
    change, error = TENSOR_REFUSALS[name]
    change_tensors(write(tmp_path), change)
    with pytest.raises(peft.AdapterError, match=error):
        peft.load(tmp_path, CONFIG)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "U8", "C64", "F1"])
def test_dtypes_that_numpy_may_not_know_are_refused(dtype, tmp_path):
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    bits = {"F4": 4, "U8": 8, "C64": 64}.get(dtype, 6)
    size = 64 * 4 * bits // 8
    header = {f"{Q0}.lora_A.weight": {"dtype": dtype, "shape": [4, 64], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(peft.AdapterError, match=dtype):
        peft.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), TypeError("odd"), KeyError("F9"), OverflowError("large"), PermissionError(13, "denied")]
)
@pytest.mark.parametrize("step", ["read_config", "_read_tensors", "modules_of"])
def test_any_failure_is_an_adapter_error(step, error, tmp_path, monkeypatch):
    write(tmp_path)

    def fail(*args):
        raise error

    monkeypatch.setattr(peft, step, fail)
    with pytest.raises(peft.AdapterError, match=rf"{tmp_path.name} cannot be read: {type(error).__name__}"):
        peft.load(tmp_path, CONFIG)


def test_long_names_do_not_make_long_errors(tmp_path):
    change_tensors(write(tmp_path), _set("x" * 100_000, ZEROS))
    with pytest.raises(peft.AdapterError) as error:
        peft.load(tmp_path, CONFIG)
    assert len(str(error.value)) < 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), min_size=1, max_size=3)
FIELDS = [*NULLS, "r", "lora_alpha", "peft_type", "layers_pattern"]


def damaged(data: bytes, changes) -> bytes:
    for at, piece in changes:
        at %= len(data)
        data = data[:at] + piece + data[at + len(piece) :]
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of an adapter, and the bytes of its config and of its weights."""
    directory = write(tmp_path_factory.mktemp("whole"), matrices(2, layers=[0]))
    return directory, *((directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


def load_or_refuse(directory, config: bytes, weights: bytes) -> None:
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    try:
        assert peft.load(directory, CONFIG).tensors
    except peft.AdapterError as error:
        assert 0 < len(str(error)) < 1000


@examples(300)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), changes=st.none() | CHANGES)
def test_any_config_loads_or_is_refused(whole, fields, changes):
    directory, config, weights = whole
    config = json.dumps(json.loads(config) | fields).encode()
    load_or_refuse(directory, config if changes is None else damaged(config, changes), weights)


BITS = {"F4": 4, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "BOOL": 8, "BF16": 16, "I32": 32, "F64": 64, "C64": 64}
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F4", "F8_E4M3", "F8_E8M0", "BF16", "F32", "F64", "I8", "BOOL", "C64", "X"]) | VALUES,
        "shape": st.lists(st.integers(0, 2**64), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 10**5), min_size=2, max_size=2) | VALUES,
    },
)


@examples(300)
@given(
    bits=st.dictionaries(st.integers(1, 4), st.sampled_from(list(BITS)), max_size=2),
    entries=st.dictionaries(st.integers(0, 4), ENTRIES, max_size=2),
    changes=CHANGES | st.none(),
    length=st.integers(0, 2**64 - 1) | st.none(),
)
def test_any_header_loads_or_is_refused(whole, bits, entries, changes, length):
    directory, config, weights = whole
    size = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    names = sorted(header)  # the first is __metadata__
    for number, dtype in bits.items():  # the same bytes as numbers of another kind
        rows, columns = header[names[number]]["shape"]
        header[names[number]] |= {"dtype": dtype, "shape": [rows, columns * 32 // BITS[dtype]]}
    for number, entry in entries.items():
        header[names[number]] |= entry
    text = json.dumps(header).encode()
    text = text if changes is None else damaged(text, changes)
    load_or_refuse(directory, config, (len(text) if length is None else length).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("adapter_config.json", None, r"no adapter_config\.json"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"\xff\xfe", "not JSON"),
        ("adapter_config.json", b"[]", "holds a list"),
        ("adapter_config.json", b"[" * 100_000, "not JSON"),
        ("adapter_model.safetensors", None, r"no adapter_model\.safetensors"),
        ("adapter_model.safetensors", b"short", "cannot be read"),
        ("adapter_model.safetensors", b"\xff" * 64, "cannot be read"),
    ],
)
def test_files_that_are_refused(file, content, error, tmp_path):
    write(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(peft.AdapterError, match=error):
        peft.load(tmp_path, CONFIG)


def test_pickled_weights_are_never_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(peft.AdapterError, match="pickled"):
        peft.load(tmp_path, CONFIG)


def test_a_file_that_is_truncated_while_it_is_read_ends_no_process(tmp_path):
    """A training loop may write to the same file again; a mapped file would end the process with a bus error."""
    write(tmp_path)
    script = f"""
import os, pathlib, safetensors.numpy
from chameleon_jax.checkpoints import peft
from tests.checkpoints.peft_samples import CONFIG

def and_then_truncate(open_it):
    def opened(file, *args, **kwargs):
        result = open_it(file, *args, **kwargs)
        if str(file).endswith(peft.WEIGHTS_FILE):
            os.truncate(file, 0)
        return result
    return opened

safetensors.numpy.safe_open = and_then_truncate(safetensors.numpy.safe_open)
pathlib.Path.read_bytes = and_then_truncate(pathlib.Path.read_bytes)
peft.load({str(tmp_path)!r}, CONFIG)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
