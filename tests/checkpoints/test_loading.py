from __future__ import annotations

import pytest

from chameleon_jax.checkpoints import gguf, huggingface, loading, orbax
from chameleon_jax.checkpoints.loading import load_checkpoint
from tests import reference_models as reference
from tests.checkpoints import test_gguf

MODEL = reference.checkpoint(reference.CONFIGS["mha"])


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


def test_anything_else_is_a_hub_id(monkeypatch):
    monkeypatch.setattr(loading.huggingface, "load", lambda name: name)
    assert load_checkpoint("org/model") == "org/model"
