"""The torch model beside this project's own, which runs on the CPU, with the same weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.device.peers.torch_llama import PLAIN, LayerWeights, Pieces, TorchLlama, Weights
from benchmarks.device.peers.torch_steps import Step
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.llama import Llama, causal_attention, random_model

ROWS, PROMPT, STEPS = 3, 13, 4


def largest_error(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, attention: str, pieces: Pieces = PLAIN
) -> float:
    """Of logits after a prompt and after some decode steps, as a share of the largest logit of the float32 reference.

    On a GPU each step is captured and replayed, as it is when it is timed.
    """
    ours, tokens, wanted = _reference(config)
    model = TorchLlama(config, _weights_of(ours, dtype, device), PROMPT + STEPS)
    cache = model.cache(ROWS, PROMPT + STEPS)
    words = torch.from_numpy(tokens).to(device)
    errors = []
    for begin, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        step = Step(model, words[:, begin:end].contiguous(), begin, cache, attention, pieces)
        step.run()
        errors.append(np.abs(step.logits.float().cpu().numpy() - wanted[:, end - 1]).max())
    return float(max(errors) / np.abs(wanted).max())


@functools.cache
def _reference(config: LlamaConfig) -> tuple[Llama, np.ndarray, np.ndarray]:
    """The model, tokens `[rows, tokens]`, and logits `[rows, tokens, vocab]`."""
    jax.config.update("jax_platforms", "cpu")  # in this process JAX must not take the GPU
    model = random_model(config, jnp.dtype(jnp.float32))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, PROMPT + STEPS))
    positions = jnp.broadcast_to(jnp.arange(PROMPT + STEPS), tokens.shape)
    hidden, _ = model(jnp.asarray(tokens), positions, [None] * config.num_layers, causal_attention)
    return model, tokens, np.asarray(model.logits(hidden))


def _weights_of(model: Llama, dtype: torch.dtype, device: torch.device) -> Weights:
    def tensor(array: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(device, dtype)

    layers = [
        LayerWeights(
            tensor(layer.attention_norm.scale[...]),
            tensor(layer.qkv.weight[...]),
            tensor(layer.o.weight[...]),
            tensor(layer.mlp_norm.scale[...]),
            tensor(layer.gate_up.weight[...]),
            tensor(layer.down.weight[...]),
        )
        for layer in model.layers
    ]
    return Weights(tensor(model.embed[...]), layers, tensor(model.norm.scale[...]), tensor(model.output_matrix))
