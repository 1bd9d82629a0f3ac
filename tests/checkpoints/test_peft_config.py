from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from chameleon_jax.checkpoints import peft
from tests.checkpoints.peft_samples import CONFIG, NULLS, PREFIX, matrices, write


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
        ({"bias": "some"}, "bias is 'some'; allowed: 'none', 'all', 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, and the adapter has no weights"),
        ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save is .*allowed: embed_tokens, lm_head"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices names embed_tokens, and the adapter has no weights"),
        ({"trainable_token_indices": {"norm": [1]}}, "trainable_token_indices is"),
        ({"trainable_token_indices": ["a"]}, r"trainable_token_indices is \['a'\]; allowed: token ids"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias are True"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; allowed: true or false"),
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
