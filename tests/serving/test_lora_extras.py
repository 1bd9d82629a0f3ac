"""Adapters with more than LoRA on the layers' matrices, against models that they are merged into."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax import LoRAMix, LoRARequest, SamplingParams
from chameleon_jax.models import llama
from chameleon_jax.models.config import TARGETS, VOCABULARY_TARGETS
from tests import reference_models as reference
from tests.serving.conftest import CONFIG

SETTINGS = {"r": 4, "lora_alpha": 8.0}
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
PROMPTS = [reference.prompt(seed, length) for seed, length in ((0, 5), (1, 70), (2, 33))]
"""One is computed in two chunks."""
LONGEST = 96
"""Tokens of the longest prompt and its output, at least."""
BASE = reference.checkpoint(CONFIG)


def name_of(layer: int, target: str) -> str:
    parent = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{target}"


class Kind:
    """An adapter, its settings, and the base model's tensors with it merged in."""

    def __init__(self, seed: int, targets: tuple[str, ...], dora: bool = False, rows: tuple[str, ...] = ()):
        rng = np.random.default_rng(seed)
        self.weights: dict[str, np.ndarray] = {}
        self.settings: dict[str, Any] = SETTINGS | {"use_dora": dora}
        self.merged = dict(BASE.tensors)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32) * 0.3

        for target in targets:
            if target not in VOCABULARY_TARGETS:
                for layer in range(CONFIG.num_layers):
                    d_in, d_out = CONFIG.target_shape(target)
                    self._add(name_of(layer, target), normal(4, d_in), normal(d_out, 4), dora)
        vocab, hidden = CONFIG.vocab_size, CONFIG.hidden_size
        if "lm_head" in targets:
            self._add("lm_head", normal(4, hidden), normal(vocab, 4), False)
        if "embed_tokens" in targets:
            a, b = normal(4, vocab), normal(hidden, 4)
            self.weights |= {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
            self.merged["model.embed_tokens.weight"] = self.merged["model.embed_tokens.weight"] + 2 * (b @ a).T
        for target in rows:
            module = "lm_head" if target == "lm_head" else f"model.{target}"
            matrix = self.merged[f"{module}.weight"].copy()
            matrix[rng.permutation(vocab)[:30]] += 3 * normal(30, hidden)
            self.weights[f"{module}.weight"] = self.merged[f"{module}.weight"] = matrix
        if rows:
            self.settings["modules_to_save"] = list(rows)

    def _add(self, module: str, a: np.ndarray, b: np.ndarray, dora: bool) -> None:
        self.weights |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        matrix = self.merged[f"{module}.weight"] + 2 * (b @ a)
        if dora:
            magnitude = np.linalg.norm(matrix, axis=1) * np.linspace(0.5, 1.5, len(matrix), dtype=np.float32)
            self.weights[f"{module}.lora_magnitude_vector"] = magnitude
            matrix *= np.linspace(0.5, 1.5, len(matrix), dtype=np.float32)[:, None]
        self.merged[f"{module}.weight"] = matrix


KINDS = {
    "plain": Kind(1, ("q_proj", "down_proj")),
    "vocabulary": Kind(2, ("v_proj", "embed_tokens", "lm_head")),
    "head": Kind(3, ("lm_head",)),
    "embedding": Kind(4, ("embed_tokens",)),
    "dora": Kind(5, TARGETS, dora=True),
    "dora of one": Kind(6, ("o_proj",), dora=True),
    "rows": Kind(7, ("q_proj",), rows=("embed_tokens", "lm_head")),
}
BIASED = {
    f"{name}.lora_B.bias": np.linspace(-1, 1, CONFIG.target_shape(name.rpartition(".")[2])[1], dtype=np.float32)
    for name in (name_of(layer, target) for layer in range(CONFIG.num_layers) for target in ("q_proj", "down_proj"))
}
"""Biases of the plain adapter's matrices."""


MERGED = {"base": BASE.tensors} | {name: kind.merged for name, kind in KINDS.items()}
MERGED["mixed"] = {
    name: tensor + 0.5 * (KINDS["head"].merged[name] - tensor) - (KINDS["embedding"].merged[name] - tensor)
    for name, tensor in BASE.tensors.items()
}


@functools.cache
def dense():
    """The reference model's log-probabilities, without a pool, as a function of its weights, tokens and biases of outputs."""
    graph, _ = nnx.split(llama.load_tensors(CONFIG, BASE.tensors, jnp.dtype(jnp.float32)))

    def adapt(targets, y, x, biases):
        nothing = [jnp.zeros(CONFIG.target_shape(target)[1]) for target in targets]
        return y + jnp.concatenate([biases.get(target, zeros) for target, zeros in zip(targets, nothing)])

    @jax.jit
    def run(params, tokens, biases):
        model = nnx.merge(graph, params)
        hidden, _ = model(tokens[None], jnp.arange(LONGEST)[None], biases, llama.causal_attention, adapt)
        return jax.nn.log_softmax(model.logits(hidden)[0])

    return run


NO_BIASES: list[dict[str, np.ndarray]] = [{} for _ in range(CONFIG.num_layers)]


def assert_same(output, name: str, biases=NO_BIASES) -> None:
    """Compare an output with the merged model, which reads the prompt and the output's own tokens."""
    params = nnx.split(llama.load_tensors(CONFIG, MERGED[name], jnp.dtype(jnp.float32)))[1]
    tokens, drawn = output.prompt_token_ids, output.outputs[0].token_ids
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(tokens) + len(drawn)] = [*tokens, *drawn]
    right = np.asarray(dense()(params, padded, biases))[len(tokens) - 1 :]
    assert drawn == right[: len(drawn)].argmax(-1).tolist()
    for logprobs, row in zip(output.outputs[0].logprobs, right):
        np.testing.assert_allclose([logprobs[t].logprob for t in logprobs], [row[t] for t in logprobs], atol=2e-3)


@pytest.fixture
def extras(make_llm, text_model):
    with make_llm(text_model, enable_lora_extras=True) as llm:
        for name, kind in KINDS.items():
            llm.add_lora(name, weights=kind.weights, peft_config=kind.settings)
        yield llm


@pytest.mark.parametrize("first_prompt", range(3))
def test_each_is_the_model_that_it_is_merged_into_beside_others(extras, first_prompt):
    """One batch has a row of the base model, of plain LoRA, and of every kind."""
    names = ["base", *KINDS]
    prompts = [PROMPTS[(first_prompt + i) % 3] for i in range(len(names))]
    loras = [None if name == "base" else LoRARequest(name) for name in names]
    for name, output in zip(names, extras.generate(prompts, PARAMS, loras)):
        assert_same(output, name)


def test_each_is_the_model_that_it_is_merged_into_alone(extras):
    found = set()
    for name in KINDS:
        [output] = extras.generate(PROMPTS[:1], PARAMS, LoRARequest(name))
        assert_same(output, name)
        found.add(tuple(output.outputs[0].token_ids))
    assert len(found) == len(KINDS)  # or the comparison would show little


def test_biases_are_added_with_the_scale_of_their_adapter(extras):
    kind = KINDS["plain"]
    extras.add_lora("biased", weights=kind.weights | BIASED, peft_config=kind.settings | {"lora_bias": True})
    biases = [
        {t: 2 * BIASED[f"{name_of(i, t)}.lora_B.bias"] for t in ("q_proj", "down_proj")} for i in range(CONFIG.num_layers)
    ]
    outputs = extras.generate(PROMPTS, PARAMS, [LoRARequest("biased"), LoRARequest("biased"), LoRARequest("plain")])
    for output, added in zip(outputs, (biases, biases, NO_BIASES)):
        assert_same(output, "plain", added)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_stand_for_both_matrices_of_a_tied_model(tied, make_llm, text_model, tmp_path):
    config = reference.CONFIGS["tied" if tied else "gqa"]
    base = reference.checkpoint(config).tensors["model.embed_tokens.weight"]
    tokens = [PROMPTS[0][0], PROMPTS[0][2]]
    weights = {"model.embed_tokens.token_adapter.trainable_tokens_delta": base[tokens] + 1}
    model = reference.save_model(tmp_path / "tied", "tied") if tied else text_model
    with make_llm(model, enable_lora_extras=True) as llm:
        llm.add_lora("x", weights=weights, peft_config={"lora_alpha": 1, "trainable_token_indices": tokens})
        ranks = llm.engine._executor.placement(llm.engine.adapters.named("x").content_hash).ranks
        assert ranks == ({"embed_tokens": 2, "lm_head": 2} if tied else {"embed_tokens": 2})
        [[changed], [plain]] = [llm.generate(PROMPTS[:1], PARAMS, lora) for lora in (LoRARequest("x"), None)]
        assert changed.outputs[0].logprobs != plain.outputs[0].logprobs


def test_an_adapter_on_the_device_is_the_one_of_the_host(extras):
    for name in ("vocabulary", "dora", "rows"):
        on_device = {key: jnp.asarray(value) for key, value in KINDS[name].weights.items()}
        extras.add_lora("x", weights=on_device, peft_config=KINDS[name].settings)
        assert extras.engine.adapters.named("x") == extras.engine.adapters.named(name)


def test_only_batches_with_extras_run_their_programs(extras, monkeypatch):
    runner, ran = extras.engine.runner, []
    monkeypatch.setattr(
        runner, "sample", lambda running, *rest, sample=runner.sample: (ran.append(running), sample(running, *rest))[1]
    )
    for name, expected in (("plain", False), ("dora of one", True), ("head", True)):
        ran.clear()
        extras.generate(PROMPTS, PARAMS, [None, LoRARequest(name), None])
        assert {running.step.program.extras for running in ran if running.step.program.adapted} == {expected}
        assert {running.logit_updates is not None for running in ran if running.step.program.adapted} == {expected}
        assert any(running.step.program.adapted == 0 for running in ran)  # the other rows go on when the adapter's has ended


def test_other_parameters_hold_beside_an_adapted_head(extras):
    kind = LoRARequest("head")
    [plain] = extras.generate(PROMPTS[:1], PARAMS, kind)
    first = plain.outputs[0].token_ids[0]
    [banned] = extras.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=4, logit_bias={first: -100}), kind)
    assert banned.outputs[0].token_ids[0] != first
    [forced] = extras.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[9]), kind)
    assert forced.outputs[0].token_ids == [9] * 4
    best = plain.outputs[0].logprobs[0]
    assert max(best, key=lambda token: best[token].logprob) == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vocabulary",
            "has embed_tokens, lm_head; allowed: LoRA on the layers' matrices, or all of that with enable_lora_extras",
        ),
        ("dora", "has DoRA; allowed"),
        ("rows", "has embed_tokens, lm_head; allowed"),
    ],
)
def test_without_the_setting_the_server_refuses_them_and_names_it(make_llm, text_model, name, message):
    with make_llm(text_model) as llm:
        with pytest.raises(ValueError, match=f"adapter 'x' {message}"):
            llm.add_lora("x", weights=KINDS[name].weights, peft_config=KINDS[name].settings)
        assert llm.list_loras() == []


def test_embeddings_that_are_saved_and_not_trained_are_no_extras(make_llm, text_model):
    saved = {f"{module}.base_layer.weight": BASE.tensors[f"{module}.weight"] for module in ("model.embed_tokens", "lm_head")}
    with make_llm(text_model) as llm:
        llm.add_lora("x", weights=KINDS["plain"].weights, peft_config=SETTINGS)
        llm.add_lora("y", weights=KINDS["plain"].weights | saved, peft_config=SETTINGS)
        assert llm.engine.adapters.named("x") == llm.engine.adapters.named("y")
        with pytest.raises(ValueError, match="adapter 'z' equals the base model"):
            llm.add_lora("z", weights=saved, peft_config=SETTINGS)


def test_what_cannot_be_asked_of_them_is_refused_by_name(extras):
    scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
    with pytest.raises(
        ValueError, match="prompt_logprobs is set; allowed: with the base model, and adapters that do not adapt"
    ):
        extras.generate(PROMPTS[:1], scored, LoRARequest("head"))
    assert extras.generate(PROMPTS[:1], scored, LoRARequest("dora"))[0].prompt_logprobs
    with pytest.raises(ValueError, match="one of its members has DoRA or biases"):
        extras.generate(PROMPTS[:1], PARAMS, LoRAMix([LoRARequest("dora"), LoRARequest("plain")]))


def test_a_mix_has_the_embeddings_of_its_members(extras):
    [mixed] = extras.generate(PROMPTS[1:2], PARAMS, LoRAMix([LoRARequest("vocabulary")] * 1, [1.0]))
    [alone] = extras.generate(PROMPTS[1:2], PARAMS, LoRARequest("vocabulary"))
    assert_same(mixed, "vocabulary")
    assert_same(alone, "vocabulary")
    [mixed] = extras.generate(PROMPTS[1:2], PARAMS, LoRAMix([LoRARequest("head"), LoRARequest("embedding")], [0.5, -1.0]))
    assert_same(mixed, "mixed")
