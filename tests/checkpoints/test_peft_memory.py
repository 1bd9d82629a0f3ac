"""Adapters from a trainer's memory are the adapters that files with the same tensors would be."""

from __future__ import annotations

import enum
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from chameleon_jax.checkpoints import peft, peft_memory, peft_names
from chameleon_jax.checkpoints.peft_config import AdapterError
from tests import reference_models as reference

CONFIG = reference.CONFIGS["gqa"]
SETTINGS = {"r": 4, "lora_alpha": 8.0}


class PeftType(enum.Enum):
    LORA = "LORA"


class Torch:
    """Stands for a tensor of PyTorch that needs gradients."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def detach(self):
        return SimpleNamespace(cpu=lambda: SimpleNamespace(float=lambda: SimpleNamespace(numpy=lambda: self.array)))


def pairs(rank: int = 4, targets=("q_proj", "down_proj"), seed: int = 0):
    rng = np.random.default_rng(seed)

    def pair(target):
        d_in, d_out = CONFIG.target_shape(target)
        return rng.standard_normal((rank, d_in), np.float32), rng.standard_normal((d_out, rank), np.float32)

    return {(layer, target): pair(target) for layer in range(CONFIG.num_layers) for target in targets}


def by_layer(tensors):
    layers = [{} for _ in range(CONFIG.num_layers)]
    for (layer, target), pair in tensors.items():
        layers[layer][target] = pair
    return layers


def stacked(tensors):
    targets = dict.fromkeys(target for _, target in tensors)
    layers = range(CONFIG.num_layers)
    return {t: tuple(np.stack([tensors[i, t][side] for i in layers]) for side in (0, 1)) for t in targets}


def state_dict(tensors):
    return {peft_names.tensor_name(i, t, side): m for (i, t), pair in tensors.items() for side, m in zip("AB", pair)}


FORMS = {
    "pairs": lambda tensors: tensors,
    "layers": by_layer,
    "stacked": stacked,
    "state dict": state_dict,
    "jax layers": lambda tensors: jax.tree.map(jnp.asarray, by_layer(tensors)),
    "jax stacked": lambda tensors: jax.tree.map(jnp.asarray, stacked(tensors)),
    "torch": lambda tensors: {name: Torch(array) for name, array in state_dict(tensors).items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_adapter_of_the_file(form, tmp_path):
    tensors = pairs()
    peft.save(tmp_path, tensors, alpha=8.0, base_model="reference")
    expected = peft.load(tmp_path, CONFIG)
    taken = peft_memory.take(FORMS[form](tensors), SETTINGS, CONFIG)
    assert taken.on_device is form.startswith("jax")
    assert taken.tensors.keys() == expected.tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, taken.to_host().tensors, expected.tensors)


def test_the_settings_of_a_file_mean_the_same_in_memory(tmp_path):
    settings = {"lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"q_proj": 32}, "target_modules": ["q_proj", "down_proj"]}
    peft.save(tmp_path, pairs(), alpha=8.0, base_model="reference")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    expected = peft.load(tmp_path, CONFIG)
    fields = settings | {"r": 4, "target_modules": {"down_proj", "q_proj"}, "peft_type": PeftType.LORA}
    lora_config = SimpleNamespace(to_dict=lambda: fields)  # as LoraConfig has them
    for peft_config in (settings, lora_config):
        jax.tree.map(np.testing.assert_array_equal, peft_memory.take(pairs(), peft_config, CONFIG).tensors, expected.tensors)


def test_bfloat16_is_widened():
    narrow = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), pairs())
    taken = peft_memory.take(narrow, SETTINGS, CONFIG)
    assert {array.dtype for array in jax.tree.leaves(taken.tensors)} == {np.dtype(np.float32)}


def deleted():
    tree = jax.tree.map(jnp.asarray, by_layer(pairs()))
    tree[0]["q_proj"][0].delete()  # as donation does
    return tree


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        (pairs(), {}, "peft_config has no fields; allowed: lora_alpha at least"),
        (pairs(), None, "lora_alpha at least"),
        (pairs(), {"r": 4}, "peft_config has r; allowed: lora_alpha"),
        (pairs(), SETTINGS | {"r": 8}, "the config says rank 8"),
        (pairs(), SETTINGS | {"lora_alpha": "high"}, "lora_alpha is 'high'"),
        (pairs(), SETTINGS | {"use_dora": True}, "use_dora is True"),
        (pairs(), SETTINGS | {"target_modules": ["q_proj"]}, "down_proj has weights, but by target_modules"),
        ([{"embed": (1, 2)}], SETTINGS, "target is 'embed'; allowed: q_proj"),
        ([{"q_proj": np.zeros(3)}], SETTINGS, "layer 0, q_proj: a ndarray; allowed: a pair"),
        ([{"q_proj": ([1.0], [2.0])}], SETTINGS, "is a list; allowed: an array"),
        (jax.tree.map(lambda m: m.astype(np.int32), pairs()), SETTINGS, "has dtype int32; allowed: floating point"),
        (by_layer(pairs()) * 2, SETTINGS, "layer is 2; the base model has layers 0 to 1"),
        (jax.tree.map(lambda m: m[:, :-1], pairs()), {"lora_alpha": 8}, "A is|rank"),
        (jax.tree.map(lambda m: m * np.nan, pairs()), SETTINGS, "NaN or infinity"),
        ({"lm_head.lora_A.weight": np.zeros((4, 64))}, SETTINGS, "lm_head has no lora_B"),
        ({"q_proj": (np.zeros((3, 4, 64)), np.zeros((2, 64, 4)))}, SETTINGS, "weights cannot be served"),
        (7, SETTINGS, "weights is a int; allowed: a state dict of PEFT"),
        ([], SETTINGS, "adapts no matrix|r is None"),
        (deleted(), SETTINGS, "weights cannot be served: .*deleted"),
    ],
)
def test_what_cannot_be_served_says_why(weights, settings, message):
    with pytest.raises(AdapterError, match=message):
        peft_memory.take(weights, settings, CONFIG)


def test_a_state_dict_that_peft_wrote_is_taken_as_it_is(tmp_path):
    peft.save(tmp_path, pairs(), alpha=8.0, base_model="reference")
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS_FILE)
    taken = peft_memory.take(tensors, json.loads((tmp_path / "adapter_config.json").read_text()), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, taken.tensors, peft.load(tmp_path, CONFIG).tensors)
