"""Batches in transformers + peft, each row with its own adapter (`adapter_names`), beside the model without adapters."""

from __future__ import annotations

import itertools
from typing import Any

import peft
import torch
import transformers

from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.peers.torch_steps import Pending, device
from benchmarks.device.timing import Timing, time_calls

CALLS, REPEATS = 4, 3
STEPS_BEFORE = 11
"""Half of a measurement's steps, so that contexts are about the nominal one."""


class MixedAdapters:
    """Random model, and a random adapter for each row of the largest batch, on the device from the start."""

    def __init__(self, scale: Scale, mix: Mix, rows: int):
        self._scale = scale
        self._dtype = getattr(torch, scale.dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.device(device()):
                config = transformers.LlamaConfig(**scale.config.to_hf(), attn_implementation="sdpa")
                self.base = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self._mix, self.names = mix, [f"adapter{i}" for i in range(rows)]
        self._mixed: Any = None

    def measure(self, rows: int, context: int, adapted: bool) -> Timing:
        """Time forward steps with a growing KV cache (`DynamicCache`), contexts around `context`, without the prompt."""
        model = self.with_adapters() if adapted else self.base
        arguments = {"adapter_names": self.names[:rows]} if adapted else {}
        words = torch.randint(self._scale.config.vocab_size, (rows, context - STEPS_BEFORE), device=device())
        cache: Any = transformers.DynamicCache()

        @torch.inference_mode()
        def step() -> Pending:
            nonlocal words
            result = model(input_ids=words, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
            words = result.logits[:, -1:].argmax(-1)
            return Pending()

        step()
        return time_calls(step, calls=CALLS, repeats=REPEATS)

    def with_adapters(self) -> Any:
        """Model with the adapters, which `base` has too from now on."""
        if self._mixed is None:
            first, *others = zip(self.names, map(self._lora, itertools.cycle(self._mix.ranks)))
            with torch.device(device()):
                mixed = peft.get_peft_model(self.base, first[1], adapter_name=first[0])
                for name, config in others:
                    mixed.add_adapter(name, config)
            for name, parameter in mixed.named_parameters():
                if "lora_" in name:  # peft makes them float32: that would be slower
                    parameter.data = parameter.data.to(self._dtype)
            self._mixed = mixed.eval()
        return self._mixed

    def _lora(self, rank: int) -> Any:
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self._mix.targets), init_lora_weights=False)
