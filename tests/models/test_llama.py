from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.models import llama
from chameleon_jax.models.llama import ModelTensors, tensor_shapes
from tests import reference_models as reference

GQA, TIED = reference.checkpoint(reference.CONFIGS["gqa"]), reference.checkpoint(reference.CONFIGS["tied"])
Q0 = "model.layers.0.self_attn.q_proj"
VECTOR = np.ones(64, np.float32)


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_names_and_shapes_are_those_of_a_checkpoint(name):
    config = reference.CONFIGS[name]
    assert tensor_shapes(config) == {n: t.shape for n, t in reference.checkpoint(config).tensors.items()}


class Counted(Mapping[str, np.ndarray]):
    """Tensors that count their reads, as a large checkpoint is on a slow disk."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors, self.reads = tensors, Counter[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_each_tensor_is_read_once():
    counted = Counted(GQA.tensors)
    checked = ModelTensors(GQA.config, counted)
    assert not counted.reads
    llama.load_tensors(GQA.config, checked, jnp.dtype("float32"))
    assert counted.reads == dict.fromkeys(GQA.tensors, 1)


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
def test_tensors_that_mean_nothing_are_left_out(name):
    checked = ModelTensors(GQA.config, GQA.tensors | {name: VECTOR})
    assert checked.keys() == GQA.tensors.keys() and len(checked) == len(GQA.tensors)
    np.testing.assert_array_equal(checked[f"{Q0}.weight"], GQA.tensors[f"{Q0}.weight"])


LEFT_OVER = {
    "scales of int8": (f"{Q0}.weight_scale", "look like parts of quantised weights"),
    "gptq": (f"{Q0}.qweight", "look like parts of quantised weights"),
    "bitsandbytes": (f"{Q0}.weight.absmax", "look like parts of quantised weights"),
    "bias": (f"{Q0}.bias", "without biases"),
    "mlp bias": ("model.layers.1.mlp.down_proj.bias", "mlp.down_proj.bias"),
    "head bias": ("lm_head.bias", "lm_head.bias"),
    "norm of queries": ("model.layers.0.self_attn.q_norm.weight", "q_norm"),
    "layer": ("model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn.q_proj"),
    "vision": ("vision_tower.encoder.layers.0.weight", "vision_tower"),
    "adapter": ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A"),
    "experts": ("model.layers.0.block_sparse_moe.gate.weight", "block_sparse_moe"),
    "another norm": ("model.layers.0.post_feedforward_layernorm.weight", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_tensors_that_would_be_left_over_are_refused(kind):
    name, error = LEFT_OVER[kind]
    with pytest.raises(ValueError, match=error) as caught:
        llama.load_tensors(GQA.config, GQA.tensors | {name: VECTOR}, jnp.dtype("float32"))
    assert name in str(caught.value)


def test_many_left_over_make_a_short_error():
    with pytest.raises(ValueError, match="and 997 more") as error:
        ModelTensors(GQA.config, GQA.tensors | {f"vision.{i}": VECTOR for i in range(1000)})
    assert len(str(error.value)) < 500


def test_a_missing_tensor_is_named():
    with pytest.raises(ValueError, match="no tensor model.layers.1.mlp.up_proj.weight"):
        ModelTensors(GQA.config, {n: t for n, t in GQA.tensors.items() if n != "model.layers.1.mlp.up_proj.weight"})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_other_dtypes_are_refused(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    changed = GQA.tensors | {f"{Q0}.weight": GQA.tensors[f"{Q0}.weight"].astype(kind)}
    with pytest.raises(ValueError, match=f"tensor {Q0}.weight is of dtype {dtype}; allowed: float16, bfloat16"):
        llama.load_tensors(GQA.config, changed, jnp.dtype("float32"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{Q0}.weight"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[None], lambda t: t.T[..., None], lambda t: t.reshape(-1)[0]])
def test_other_shapes_are_refused(name, change):
    tensor, shape = change(GQA.tensors[name]), list(GQA.tensors[name].shape)
    with pytest.raises(ValueError) as error:
        llama.load_tensors(GQA.config, GQA.tensors | {name: tensor}, jnp.dtype("float32"))
    assert str(error.value) == f"tensor {name} is {list(tensor.shape)}; allowed: {shape}, by the config"


def test_a_head_beside_tied_embeddings_must_be_the_embedding():
    embedding = TIED.tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in ModelTensors(TIED.config, TIED.tensors | {"lm_head.weight": embedding.copy()})
    for other in (embedding + 1, embedding[:-1]):
        with pytest.raises(ValueError, match="tie_word_embeddings is True, but lm_head.weight is not"):
            ModelTensors(TIED.config, TIED.tensors | {"lm_head.weight": other})
