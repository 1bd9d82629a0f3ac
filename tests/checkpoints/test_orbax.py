from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.checkpoints import orbax
from tests import reference_models as reference
from tests.checkpoints import samples


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(dtype, tmp_path):
    checkpoint = reference.checkpoint(reference.CONFIGS["llama3-rope"])
    tensors = {name: tensor.astype(dtype) for name, tensor in checkpoint.tensors.items()}
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors, tokenizer=samples.byte_level())
    assert not orbax.is_checkpoint(tmp_path / "model")
    orbax.save(checkpoint, tmp_path / "model")
    assert orbax.is_checkpoint(tmp_path / "model")
    loaded = orbax.load(tmp_path / "model")
    assert loaded.config == checkpoint.config
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == dtype
        np.testing.assert_array_equal(loaded.tensors[name], tensor)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("hello") == checkpoint.tokenizer.encode("hello")


def test_save_replaces(tmp_path):
    for seed in (0, 1):
        checkpoint = reference.checkpoint(reference.CONFIGS["mha"], seed)
        orbax.save(checkpoint, tmp_path)
    np.testing.assert_array_equal(orbax.load(tmp_path).tensors["lm_head.weight"], checkpoint.tensors["lm_head.weight"])


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="not a converted checkpoint"):
        orbax.load(tmp_path)
