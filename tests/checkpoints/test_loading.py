from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as orbax_checkpoint
import pytest
import safetensors.numpy

from chameleon_jax.checkpoints import gguf, huggingface, loading, orbax
from chameleon_jax.checkpoints.loading import load_checkpoint
from chameleon_jax.models.llama import load_tensors
from tests import reference_models as reference
from tests.checkpoints import test_gguf

MODEL = reference.checkpoint(reference.CONFIGS["mha"])
PROJECTIONS = [name for name in MODEL.tensors if "_proj" in name]


def test_gguf_file(tmp_path):
    path = test_gguf.write(tmp_path / "model.gguf")
    assert load_checkpoint(str(path)).config.hidden_size == 256


def test_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_checkpoint(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["model.gguf", "smollm2-135m"])
def test_gguf_file_without_the_package(model, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"model is '{model}'; .* the package gguf, which is not installed"):
        load_checkpoint(model)


@pytest.mark.parametrize("kind", [huggingface, orbax])
def test_directory(kind, tmp_path):
    kind.save(MODEL, tmp_path)
    loaded = load_checkpoint(str(tmp_path))
    assert loaded.config == MODEL.config and loaded.tensors.keys() == MODEL.tensors.keys()


def test_packaged_model(monkeypatch, tmp_path):
    path = test_gguf.write(tmp_path / "packaged.gguf")
    monkeypatch.setattr(gguf, "smollm2_path", lambda: path)
    assert load_checkpoint("smollm2-135m").config.hidden_size == 256


def test_any_other_model_is_a_hub_id(monkeypatch):
    monkeypatch.setattr(loading.huggingface, "load", lambda name: name)
    assert load_checkpoint("org/model") == "org/model"


def quantised(kind: str) -> dict[str, np.ndarray]:
    """Tensors of the model as a quantiser writes them, with its scales."""
    tensors = dict(MODEL.tensors)
    for name in PROJECTIONS:
        weight = tensors.pop(name)
        scale = np.abs(weight).max(axis=1, keepdims=True) / 127
        if kind == "gptq":
            base = name.removesuffix("weight")
            tensors |= {f"{base}qweight": np.zeros((8, 64), np.int32), f"{base}scales": scale, f"{base}g_idx": scale}
            continue
        dtype = np.int8 if kind.startswith("int8") else ml_dtypes.float8_e4m3fn
        tensors[name] = (weight / scale).astype(dtype)
        if not kind.endswith("bare"):
            tensors[f"{name}_scale"] = scale
    return tensors


def write_safetensors(directory: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    huggingface.save(MODEL, directory)
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, directory / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_orbax(directory: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    orbax.save(MODEL, directory)
    with orbax_checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "orbax_weights", tensors, force=True)


def set_config(directory: pathlib.Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


WRITERS = {
    "one file": write_safetensors,
    "shards": lambda directory, tensors: write_safetensors(directory, tensors, shards=2),
    "orbax": write_orbax,
}
ERRORS = {
    "int8": "weight_scale",
    "int8 bare": r"q_proj.weight is of dtype (I8|int8); allowed: ",
    "fp8": "weight_scale",
    "fp8 bare": r"q_proj.weight is of dtype (F8_E4M3|float8_e4m3fn); allowed: ",
    "gptq": "look like parts of quantised weights: model.layers.0.mlp",
}


def read_all(model: str) -> None:
    checkpoint = load_checkpoint(model)
    load_tensors(checkpoint.config, checkpoint.tensors, jnp.dtype("float32"))


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("form", WRITERS)
def test_quantised_weights_are_refused(form, kind, tmp_path, monkeypatch):
    WRITERS[form](tmp_path, quantised(kind))
    with pytest.raises(ValueError, match=ERRORS[kind]):
        read_all(str(tmp_path))
    for to in (huggingface, orbax):
        with pytest.raises(ValueError, match=ERRORS[kind]):
            to.save(load_checkpoint(str(tmp_path)), tmp_path / "converted")
    monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    if form != "orbax":
        with pytest.raises(ValueError, match=ERRORS[kind]):
            read_all("some/model")
    set_config(tmp_path, quantization_config={"quant_method": kind})
    with pytest.raises(ValueError, match=f"quantization_config .*{kind}"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("form", WRITERS)
def test_tensors_beyond_the_config_and_other_shapes_are_refused(form, tmp_path):
    WRITERS[form](tmp_path, MODEL.tensors)
    read_all(str(tmp_path))
    set_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"not served: model\.layers\.1\..* and 6 more"):
        load_checkpoint(str(tmp_path))
    set_config(tmp_path, num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(ValueError, match=r"gate_proj.weight is \[160, 64\]; allowed: \[96, 64\]"):
        read_all(str(tmp_path))


def test_a_gguf_file_with_other_layers_or_shapes_is_refused(tmp_path):
    tensors = test_gguf.MODEL.tensors
    extra = {"blk.1.attn_norm.weight": np.ones(256, np.float32)}
    with pytest.raises(
        ValueError, match=r"tensor blk\.1\.attn_norm\.weight has no place in a Llama without biases of 1 layers"
    ):
        load_checkpoint(str(test_gguf.write(tmp_path / "layers.gguf", tensors=tensors | extra)))
    for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        full = f"model.layers.0.{name}.weight"
        path = test_gguf.write(tmp_path / f"{name}.gguf", tensors=tensors | {full: tensors[full][:64]})
        with pytest.raises(ValueError, match=rf"tensor {full} is \[64.*; allowed: \["):
            read_all(str(path))


def test_a_tensor_of_two_files_is_refused(tmp_path):
    write_safetensors(tmp_path, MODEL.tensors, shards=2)
    for i in range(2):
        file = tmp_path / f"model-{i}.safetensors"
        again = {"model.norm.weight": MODEL.tensors["model.norm.weight"]}
        safetensors.numpy.save_file(safetensors.numpy.load_file(file) | again, file)
    with pytest.raises(ValueError, match="tensor model.norm.weight is in model-0.safetensors and in model-1.safetensors"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000])
@pytest.mark.parametrize("form", WRITERS)
def test_a_config_that_cannot_be_read_is_named(form, content, tmp_path):
    WRITERS[form](tmp_path, MODEL.tensors)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        load_checkpoint(str(tmp_path))


def test_orbax_weights_that_cannot_be_read(tmp_path):
    orbax.save(MODEL, tmp_path)
    for file in (tmp_path / "orbax_weights").iterdir():
        if file.is_file():
            file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="orbax_weights cannot be read"):
        load_checkpoint(str(tmp_path))
