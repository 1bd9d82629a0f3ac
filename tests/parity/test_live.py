"""Comparison with transformers and peft themselves (`make parity`)."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints import finetune, huggingface, peft
from chameleon_jax.checkpoints.loading import load_checkpoint
from tests import reference_models as reference
from tests.parity import torch_reference
from tests.parity.write_goldens import GOLDEN, TOKENS

SETTINGS = dict(dtype="float32", max_num_batched_tokens=64, compile_programs="lazy")
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_goldens_agree_with_transformers(name, tmp_path):
    model = torch_reference.load(reference.save_model(tmp_path, name))
    golden = np.load(GOLDEN)
    assert torch_reference.greedy(model, reference.prompt(1), TOKENS) == golden[f"{name}/tokens"].tolist()
    np.testing.assert_allclose(torch_reference.logits(model, reference.prompt(1)), golden[f"{name}/logits"], atol=1e-4)


def test_goldens_agree_with_peft(tmp_path):
    directory = reference.save_model(tmp_path / "model", "gqa")
    golden = np.load(GOLDEN)
    for name, adapter in reference.save_adapters(tmp_path / "adapters", reference.CONFIGS["gqa"]).items():
        tokens = torch_reference.greedy(torch_reference.with_adapter(directory, adapter), reference.prompt(2), TOKENS)
        assert tokens == golden[f"gqa/{name}/tokens"].tolist(), name


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 12}},
        {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 40, "up_proj": 1}},
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": "all-linear"},
    ],
)
def test_adapters_that_peft_wrote_give_its_tokens(options, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    directory = reference.save_model(tmp_path / "model", "gqa")
    settings = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | options
    model = get_peft_model(torch_reference.load(directory), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "adapter")
    expected = torch_reference.greedy(model.eval(), reference.prompt(3), 32)
    with LLM(str(directory), max_num_seqs=2, max_model_len=128, num_pages=500, **SETTINGS) as llm:
        lora = LoRARequest("it", str(tmp_path / "adapter"))
        [output] = llm.generate([reference.prompt(3)], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), lora)
    assert output.outputs[0].token_ids == expected


def test_smollm2_gives_the_tokens_of_transformers(tmp_path):
    huggingface.save(load_checkpoint("smollm2-135m"), tmp_path)
    model = torch_reference.load(tmp_path)
    with LLM("smollm2-135m", max_num_seqs=4, max_model_len=128, enable_lora=False, **SETTINGS) as llm:
        prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a land far away,"]
        outputs = llm.generate(prompts, GREEDY)
    for output in outputs:
        assert output.outputs[0].token_ids == torch_reference.greedy(model, output.prompt_token_ids, 64), output.prompt


def test_peft_loads_an_adapter_that_finetune_wrote(tmp_path):
    config = reference.CONFIGS["gqa"]
    directory = reference.save_model(tmp_path / "model", "gqa")
    settings = finetune.FinetuneConfig(rank=4, targets=("q_proj", "down_proj"))
    adapter = finetune.init_adapter(config, settings)
    adapter = [{t: (a, b + 0.05) for t, (a, b) in layer.items()} for layer in adapter]
    finetune.save(adapter, tmp_path / "adapter", settings, str(directory), "float32")
    expected = torch_reference.greedy(torch_reference.with_adapter(directory, tmp_path / "adapter"), reference.prompt(4), 32)
    with LLM(str(directory), max_num_seqs=2, max_model_len=128, num_pages=500, **SETTINGS) as llm:
        lora = LoRARequest("it", str(tmp_path / "adapter"))
        [output] = llm.generate([reference.prompt(4)], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), lora)
    assert output.outputs[0].token_ids == expected
    assert peft.load(tmp_path / "adapter", config).ranks == {"q_proj": 4, "down_proj": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Models that serve adapters of all kinds, by name, each with its directory."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def serve(name):
            directory = reference.save_model(tmp_path_factory.mktemp(name), name)
            sizes = dict(max_num_seqs=2, max_model_len=128, num_pages=500)
            return directory, stack.enter_context(LLM(str(directory), enable_lora_extras=True, **sizes, **SETTINGS))

        yield serve


VOCABULARY = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


@pytest.mark.parametrize("name", ["gqa", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
        {"lora_bias": True},
        {"bias": "all"},
        VOCABULARY,
        VOCABULARY | {"rank_pattern": {"lm_head": 20}, "alpha_pattern": {"embed_tokens": 5}},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": [3, 5, 250]},
        {"trainable_token_indices": {"embed_tokens": [3, 5, 7]}, "use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_more_than_lora_on_the_layers_gives_peft_s_logits(options, name, served, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    directory, llm = served(name)
    settings = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | options
    model = get_peft_model(torch_reference.load(directory), LoraConfig(init_lora_weights=False, **settings))
    prompt = reference.prompt(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "magnitude" in parameter_name or ".bias" in parameter_name or "trainable_tokens_delta" in parameter_name:
                parameter += torch.randn_like(parameter) * 0.2
            if "modules_to_save.default" in parameter_name:
                parameter[prompt[:9]] += torch.randn(9, parameter.shape[1])
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected = torch_reference.greedy(model, prompt, 12)
    assert (
        np.abs(torch_reference.logits(model, prompt) - torch_reference.logits(torch_reference.load(directory), prompt)).max()
        > 0.5
    )
    logprobs = torch.from_numpy(torch_reference.logits(model, prompt)[-1]).log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    [output] = llm.generate([prompt], params, LoRARequest("it", str(tmp_path / "adapter")))
    assert output.outputs[0].token_ids == expected
    best = output.outputs[0].logprobs[0]
    np.testing.assert_allclose([best[token].logprob for token in best], [logprobs[token] for token in best], atol=2e-3)
