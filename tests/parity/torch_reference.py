"""Greedy tokens and logits of the reference models by transformers and peft. Needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

torch.set_num_threads(1)  # the models are small, and threads of several test processes would wait for one another


def load(directory: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def with_adapter(directory: Path, adapter: Path) -> torch.nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(load(directory), adapter).eval()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """Generate exactly `tokens` ids; an end-of-sequence id does not end them."""
    ids = torch.tensor([prompt])
    cache = None
    out: list[int] = []
    for _ in range(tokens):
        result = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        ids = result.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """Compute the logits `[tokens, vocab]` of a prompt."""
    return model(input_ids=torch.tensor([prompt])).logits[0].numpy()
