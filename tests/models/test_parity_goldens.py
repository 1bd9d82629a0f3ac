"""Greedy tokens and logits as transformers and peft gave them (tests/parity/write_goldens.py), in float32."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.models import llama
from tests import reference_models as reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "parity.npz")
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
SMALL = dict(dtype="float32", max_model_len=128, max_num_batched_tokens=64, num_pages=2000, compile_programs="lazy")


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_dense_logits_are_those_of_transformers(name):
    config = reference.CONFIGS[name]
    model = llama.load_tensors(config, reference.checkpoint(config).tensors, jnp.dtype("float32"))
    tokens = jnp.array([reference.prompt(1)])
    hidden, _ = model(tokens, jnp.arange(tokens.shape[1])[None], [None] * config.num_layers, llama.causal_attention)
    np.testing.assert_allclose(model.logits(hidden)[0], GOLDEN[f"{name}/logits"], atol=1e-4)


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    with LLM(str(reference.save_model(tmp_path, name)), max_num_seqs=2, enable_lora=False, **SMALL) as llm:
        [output] = llm.generate([reference.prompt(1)], GREEDY)
    assert output.outputs[0].token_ids == GOLDEN[f"{name}/tokens"].tolist()


def test_each_row_of_a_batch_of_mixed_ranks_has_the_tokens_that_peft_gives_it_alone(make_llm, tmp_path):
    config = reference.CONFIGS["gqa"]
    adapters = reference.save_adapters(tmp_path / "adapters", config)
    directory = reference.save_model(tmp_path / "model", "gqa")
    with make_llm(directory, max_num_seqs=16) as llm:
        names = [*adapters, None, None]
        prompts = [reference.prompt(2)] * len(adapters) + [reference.prompt(1)] * 2
        loras = [LoRARequest(name, str(adapters[name])) if name else None for name in names]
        outputs = llm.generate(prompts, GREEDY, lora_request=loras)
    for name, output in zip(names, outputs):
        expected = GOLDEN[f"gqa/{name}/tokens" if name else "gqa/tokens"].tolist()
        assert output.outputs[0].token_ids == expected, name
