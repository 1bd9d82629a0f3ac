"""Adapters in peft's layout, whole or changed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import safetensors.numpy

from chameleon_jax.checkpoints import peft
from tests import reference_models as reference

CONFIG = dataclasses.replace(reference.CONFIGS["gqa"], num_layers=3)
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
    """Write an adapter with some of its settings replaced."""
    peft.save(directory, matrices() if tensors is None else tensors, alpha=8, base_model="base")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


def change_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
