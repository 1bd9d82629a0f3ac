from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_jax.checkpoints import peft
from chameleon_jax.models.config import TARGETS
from tests import reference_models as reference

CONFIG = reference.CONFIGS["gqa"]  # 3 layers
PREFIX = "base_model.model.model.layers"
Q0 = f"{PREFIX}.0.self_attn.q_proj"


NULLS = (
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "init_lora_weights",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "loftq_config",
    "task_type",
)
"""Fields that peft writes as null, or takes as null for their default."""


def matrices(rank=4, targets=("q_proj", "down_proj"), layers=range(3), seed=0):
    rng = np.random.default_rng(seed)
    return {
        (layer, target): (
            rng.standard_normal((rank, CONFIG.target_shape(target)[0])).astype(np.float32),
            rng.standard_normal((CONFIG.target_shape(target)[1], rank)).astype(np.float32),
        )
        for layer in layers
        for target in targets
    }


def write(directory, tensors=None, **settings):
    """An adapter with some of its settings replaced."""
    peft.save(directory, matrices() if tensors is None else tensors, alpha=8, base_model="base")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


def change_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


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


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 2.5}, 0.625),
        ({"alpha_pattern": {"q_proj": 1}}, 0.25),
        ({"alpha_pattern": {"self_attn.q_proj": 1}, "use_rslora": True}, 0.5),
        ({"alpha_pattern": {r"layers\.0\..*": 1}}, 0.25),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1}}, 0.25),
        ({"alpha_pattern": {"proj": 1}}, 2.0),  # only whole names: peft matches from a dot to the end
        ({"alpha_pattern": {"self_attn": 1}}, 2.0),
        ({"alpha_pattern": {r"layers\.1\..*": 1}}, 2.0),
        ({"alpha_pattern": {".*q_proj": 1, "q_proj": 3}}, 0.25),  # the first that matches
        ({"init_lora_weights": "gaussian", "exclude_modules": None, "layers_to_transform": None}, 2.0),
        ({"target_modules": r".*\.(q|down)_proj"}, 2.0),
        ({"target_modules": r"(?i)^(?!.*vision).*\.(?:Q|DOWN)_proj$"}, 2.0),
        ({"target_modules": "all-linear"}, 2.0),
        ({"target_modules": ["mlp.down_proj", "self_attn.q_proj"]}, 2.0),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, 2.0),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}, 2.0),
        ({"exclude_modules": ["lm_head", "v_proj"]}, 2.0),
        ({field: None for field in NULLS}, 2.0),
    ],
)
def test_scale_of_the_first_query_matrix(settings, scale, tmp_path):
    loaded = peft.load(write(tmp_path, **settings), CONFIG)
    np.testing.assert_allclose(loaded.tensors[0, "q_proj"][1], matrices()[0, "q_proj"][1] * scale, rtol=1e-6)


def test_rank_pattern(tmp_path):
    tensors = matrices(4, ("q_proj",)) | matrices(2, ("down_proj",))
    directory = write(tmp_path)
    named = {}
    for (layer, target), pair in tensors.items():
        parent = "mlp" if target == "down_proj" else "self_attn"
        named |= {f"{PREFIX}.{layer}.{parent}.{target}.lora_{s}.weight": m for s, m in zip("AB", pair)}
    safetensors.numpy.save_file(named, directory / "adapter_model.safetensors")
    with pytest.raises(peft.AdapterError, match="the config says rank 4"):
        peft.load(directory, CONFIG)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"mlp.down_proj": 2}}))
    loaded = peft.load(directory, CONFIG)
    assert loaded.ranks == {"q_proj": 4, "down_proj": 2}
    np.testing.assert_allclose(loaded.tensors[0, "down_proj"][1], tensors[0, "down_proj"][1] * 4)
    np.testing.assert_allclose(loaded.tensors[0, "q_proj"][1], tensors[0, "q_proj"][1] * 2)


@pytest.mark.parametrize("layers", [[0, 2], 1])
def test_layers_to_transform(layers, tmp_path):
    wanted = [layers] if isinstance(layers, int) else layers
    loaded = peft.load(write(tmp_path, matrices(layers=wanted), layers_to_transform=layers), CONFIG)
    assert {layer for layer, _ in loaded.tensors} == set(wanted)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": 513}, "r is 513; allowed: 1 to 512"),
        ({"r": "4"}, "r is '4'"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 513}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "the config says rank 3"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "NaN or infinity"),
        ({"target_modules": ["q_proj"]}, "down_proj has weights"),
        ({"target_modules": "q_proj"}, "has weights"),
        ({"target_modules": "("}, "target_modules: '\\('"),
        ({"alpha_pattern": {"((((a{1000}){1000}){1000}){1000})": 1, "*": 1}}, "alpha_pattern: '\\*' is no pattern"),
        ({"target_modules": 7}, "target_modules"),
        ({"target_modules": [7]}, "target_modules"),
        ({"layers_to_transform": [0, 1]}, "layers.2.*has weights"),
        ({"layers_to_transform": "all"}, "layers_to_transform"),
        ({"layers_to_transform": True}, "layers_to_transform is True"),
        ({"exclude_modules": ["down_proj"]}, r"down_proj has weights, but .*exclude_modules \(\['down_proj'\]\)"),
        ({"exclude_modules": r".*\.0\..*"}, "layers.0.*exclude_modules"),
        ({"exclude_modules": 7}, "exclude_modules is 7"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; allowed: true or false"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": None}, "r is None; allowed: 1 to 512"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_configs_that_are_refused(settings, error, tmp_path):
    write(tmp_path, **settings)
    with pytest.raises(peft.AdapterError, match=error):
        peft.load(tmp_path, CONFIG)


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


ZEROS = np.zeros((4, 64), np.float32)
TENSOR_REFUSALS = {
    "embedding": (_set("base_model.model.model.embed_tokens.lora_embedding_A", ZEROS), "embed_tokens"),
    "lm_head": (_set("base_model.model.lm_head.lora_A.weight", ZEROS), "lm_head"),
    "whole module": (_set("base_model.model.lm_head.weight", ZEROS), "lm_head"),
    "dora": (_set(f"{Q0}.lora_magnitude_vector", ZEROS), "lora_magnitude_vector"),
    "bias": (_set(f"{Q0}.lora_B.bias", ZEROS), "lora_B.bias"),
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
        "embed_tokens.*of its own, for a vocabulary of 300; the base model has 256.*merge the adapter",
    ),
    "resized vocabulary, adapted": (
        _set("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 300), np.float32)),
        "adapts embeddings, for a vocabulary of 300; the base model has 256",
    ),
    "embedding of the base model's size": (
        _set("base_model.model.model.embed_tokens.weight", np.zeros((256, 64), np.float32)),
        "for a vocabulary of 256; .*save_embedding_layers=False",
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
@pytest.mark.parametrize("step", ["read_config", "_read_tensors", "_by_module"])
def test_whatever_fails_is_the_adapters_fault(step, error, tmp_path, monkeypatch):
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
    """An adapter, its config's and its weights' bytes."""
    directory = write(tmp_path_factory.mktemp("whole"), matrices(2, layers=[0]))
    return directory, *((directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


def load_or_refuse(directory, config: bytes, weights: bytes) -> None:
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    try:
        assert peft.load(directory, CONFIG).tensors
    except peft.AdapterError as error:
        assert 0 < len(str(error)) < 1000


@settings(max_examples=300, derandomize=True, deadline=None)
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


@settings(max_examples=300, derandomize=True, deadline=None)
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
    """A training loop may write to the same file again; what is mapped would end the process with a bus error."""
    write(tmp_path)
    script = f"""
import os, pathlib, safetensors.numpy
from chameleon_jax.checkpoints import peft
from tests.checkpoints.test_peft import CONFIG

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
