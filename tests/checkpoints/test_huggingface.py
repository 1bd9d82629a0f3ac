from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from chameleon_jax.checkpoints import huggingface
from tests import reference_models as reference
from tests.checkpoints import samples


def tiny(dtype=np.float32, tokenizer=None):
    checkpoint = reference.checkpoint(reference.CONFIGS["llama3-rope"])
    tensors = {name: tensor.astype(dtype) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors, tokenizer=tokenizer)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(tensors[name], tensor)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(dtype, tmp_path):
    checkpoint = tiny(dtype, samples.byte_level())
    huggingface.save(checkpoint, tmp_path)
    loaded = huggingface.load(tmp_path)
    assert loaded.config == checkpoint.config
    assert_same(loaded.tensors, checkpoint.tensors)
    assert loaded.tokenizer.encode("hello") == checkpoint.tokenizer.encode("hello")


def test_save_writes_transposed_views_rightly(tmp_path):
    checkpoint = tiny()
    views = {name: np.asfortranarray(tensor) for name, tensor in checkpoint.tensors.items()}
    huggingface.save(dataclasses.replace(checkpoint, tensors=views), tmp_path)
    assert_same(huggingface.load(tmp_path).tensors, checkpoint.tensors)


def shard(directory, names=("model-1.safetensors", "model-2.safetensors")):
    huggingface.save(tiny(), directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for name, part in zip(names, (list(tensors)[::2], list(tensors)[1::2])):
        safetensors.numpy.save_file({t: tensors[t] for t in part}, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards(tmp_path):
    shard(tmp_path)
    assert_same(huggingface.load(tmp_path).tensors, tiny().tensors)


def test_save_replaces_shards(tmp_path):
    shard(tmp_path)
    checkpoint = tiny(np.float16)
    huggingface.save(checkpoint, tmp_path)
    assert_same(huggingface.load(tmp_path).tensors, checkpoint.tensors)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", "sub/w.safetensors", "w.bin", ".."])
def test_index_names_only_files_in_the_directory(name, tmp_path):
    weight_map = shard(tmp_path)
    weight_map["model.norm.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="plain"):
        huggingface.load(tmp_path)


def test_missing_shard(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="model-2.safetensors"):
        huggingface.load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    huggingface.save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is pickled"):
        huggingface.load(tmp_path)


def test_no_weights_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny().config.to_hf()))
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("generation_config.json", "nonsense"),
        ("model.safetensors", "short"),
        ("model.safetensors.index.json", "{}"),
        ("tokenizer.json", "{}"),
    ],
)
def test_broken_files_are_named(file, content, tmp_path):
    huggingface.save(tiny(), tmp_path)
    if file.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        huggingface.load(tmp_path)


def test_generation_config_names_the_end_of_turn(tmp_path):
    huggingface.save(tiny(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert huggingface.load(tmp_path).config.eos_token_ids == (7, 9)


def test_hub_id_that_cannot_be_fetched(monkeypatch):
    def fail(repo_id, **options):
        assert not any("bin" in pattern for pattern in options["allow_patterns"])
        raise OSError("offline")

    monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="no/such.*offline"):
        huggingface.load("no/such")


def test_hub_id(monkeypatch, tmp_path):
    huggingface.save(tiny(), tmp_path)
    monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", lambda repo_id, **options: str(tmp_path))
    assert huggingface.load("some/model").config == tiny().config
