"""Torch model against this project's own, which runs on the CPU, with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.device.sections.peers.torch_llama import PLAIN, LayerWeights, Pieces, TorchLlama, Weights
from benchmarks.device.sections.peers.torch_lora import AdapterStack, BmmAdapters, Owners, in_stack_order
from benchmarks.device.sections.peers.torch_mixes import Build
from benchmarks.device.sections.peers.torch_steps import TORCHS_CHOICE, Step
from chameleon_jax.models.config import TARGETS, LlamaConfig
from chameleon_jax.models.llama import Llama, causal_attention, random_model

ROWS, PROMPT, STEPS = 3, 13, 4
RANKS = (3, 8, 17, 40)
"""Ranks of the adapters; all need padding."""
MIXED_ROWS: Owners = (1, None, 3, 0, 2, 3, None)
"""Adapters of rows in no order, two of them with one adapter, two with none."""


def largest_error(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    pieces: Pieces = PLAIN,
    build: Build | None = None,
    owners: Owners = (None,) * ROWS,
) -> float:
    """Error of logits after a prompt and after some decode steps, as a share of the largest logit of the float32 reference.

    On a GPU each step is captured and replayed, as it is when it is timed.

    `build` makes a step's adapters, and None leaves them out; prompts that it cannot compute go through copies by index.
    `owners` has the adapter of each row as an index into RANKS."""
    ours, tokens, wanted = _reference(config, tuple(owners))
    model = TorchLlama(config, _weights_of(ours, dtype, device), PROMPT + STEPS)
    cache = model.cache(len(owners), PROMPT + STEPS)
    words = torch.from_numpy(tokens).to(device)
    decode = None if build is None else build(_stack(config, dtype, device), owners)
    prompts = decode if decode is None or decode.prompts else BmmAdapters(decode.stack, owners, in_order=False)
    errors = []
    for begin, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        adapters = decode if end - begin == 1 else prompts
        step = Step(model, words[:, begin:end].contiguous(), begin, cache, attention, pieces, adapters)
        step.run()
        errors.append(np.abs(step.logits.float().cpu().numpy() - wanted[:, end - 1]).max())
    return float(max(errors) / np.abs(wanted).max())


def mixed_error(config: LlamaConfig, dtype: torch.dtype, device: torch.device, build: Build, in_order: bool) -> float:
    """Error of MIXED_ROWS, or with `in_order` of a row for each adapter and one without, in the stack's order."""
    owners = in_stack_order(_stack(config, dtype, device), [*range(len(RANKS)), None]) if in_order else MIXED_ROWS
    return largest_error(config, dtype, device, TORCHS_CHOICE, PLAIN, build, owners)


@functools.cache
def _reference(config: LlamaConfig, owners: tuple[int | None, ...]) -> tuple[Llama, np.ndarray, np.ndarray]:
    """Model, tokens `[rows, tokens]`, and logits `[rows, tokens, vocab]`."""
    jax.config.update("jax_platforms", "cpu")  # in this process JAX must not take the GPU
    model = random_model(config, jnp.dtype(jnp.float32))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(owners), PROMPT + STEPS))
    positions = jnp.broadcast_to(jnp.arange(PROMPT + STEPS), tokens.shape)
    adapted = any(owner is not None for owner in owners)
    extras = [_adapters_of_rows(config, layer, owners) if adapted else None for layer in range(config.num_layers)]
    hidden, _ = model(jnp.asarray(tokens), positions, extras, causal_attention, _adapt if adapted else None)
    return model, tokens, np.asarray(model.logits(hidden))


def _adapt(targets: tuple[str, ...], y: jax.Array, x: jax.Array, adapters: Any) -> jax.Array:
    return y + jnp.concatenate([jnp.einsum("btd,brd,bor->bto", x, *adapters[target]) for target in targets], -1)


def _adapters_of_rows(config: LlamaConfig, layer: int, owners: tuple[int | None, ...]) -> dict[str, Any]:
    """Make A `[rows, rank, d_in]` and B `[rows, d_out, rank]` by target, with the largest rank, zero beyond a row's own."""
    found = {}
    for target in TARGETS:
        d_in, d_out = config.target_shape(target)
        a, b = np.zeros((len(owners), max(RANKS), d_in), np.float32), np.zeros((len(owners), d_out, max(RANKS)), np.float32)
        for row, owner in enumerate(owners):
            if owner is not None:
                a[row, : RANKS[owner]], b[row, :, : RANKS[owner]] = _matrices(config, owner, layer, target)
        found[target] = jnp.asarray(a), jnp.asarray(b)
    return found


def _matrices(config: LlamaConfig, adapter: int, layer: int, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Make A `[rank, d_in]` and B `[d_out, rank]`, large enough to make a wrong adapter conspicuous."""
    rng = np.random.default_rng([adapter, layer, TARGETS.index(target)])
    (d_in, d_out), rank = config.target_shape(target), RANKS[adapter]
    a = rng.standard_normal((rank, d_in)) * d_in**-0.5
    return a.astype(np.float32), (rng.standard_normal((d_out, rank)) * 0.4 * rank**-0.5).astype(np.float32)


def _stack(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> AdapterStack:
    stack = AdapterStack(config, RANKS, TARGETS, dtype, device)
    for adapter in range(len(RANKS)):
        for layer in range(config.num_layers):
            for target in TARGETS:
                stack.put(adapter, layer, target, *_matrices(config, adapter, layer, target))
    return stack


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
