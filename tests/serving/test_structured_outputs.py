"""Structured outputs and adjusted logits through the whole engine: equal tokens alone, in a batch, and recomputed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
from typing import Any

import openai
import pytest

from chameleon_jax import LLM, SamplingParams
from chameleon_jax.errors import InvalidGrammar, RequestFailed
from chameleon_jax.outputs import CompletionOutput
from chameleon_jax.sampling_params import StructuredOutputsParams
from tests.serving.async_calls import run
from tests.serving.running import TIMEOUT

PROMPTS = ["The capital of", "Paris is a city", "France", "a city with", "is", "The", "of", "capital"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "of"]}, "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 3}},
    "required": ["city", "sizes"],
    "additionalProperties": False,
}
LANGUAGES = [
    StructuredOutputsParams(json=SCHEMA, whitespace_pattern=" ?"),
    StructuredOutputsParams(regex="[0-9]{3}-[a-c]{20,30}"),
    StructuredOutputsParams(choice=["crimson", "deep sea blue", "ü"]),
    StructuredOutputsParams(grammar='start: "(" start ")" | digit digit digit\ndigit: /[0-9]/'),
]
MIXED: list[dict[str, Any]] = [
    *[{"structured_outputs": language} for language in LANGUAGES],
    {},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 2.0, "logit_bias": {9: 4.0}},
    {"allowed_token_ids": list(range(10, 40)), "frequency_penalty": 2.0},
]
"""Parameters of one request for each of PROMPTS."""


@pytest.fixture(scope="module")
def llm(engines, llama2_model):
    with engines.borrow(llama2_model) as engine, LLM(engine) as llm:
        yield llm


def params(i: int, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=i, max_tokens=60, **MIXED[i])


def generate(llm: LLM, temperature: float, which: list[int] | None = None, times: int = 1) -> list[CompletionOutput]:
    which = (which or list(range(len(PROMPTS)))) * times
    outputs = llm.generate([PROMPTS[i] for i in which], [params(i, temperature) for i in which])
    return [output.outputs[0] for output in outputs]


def tokens(outputs: list[CompletionOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module", params=[0.0, 1.0])
def temperature(request) -> float:
    return request.param


@pytest.fixture(scope="module")
def alone(llm, temperature) -> list[CompletionOutput]:
    return [generate(llm, temperature, [i])[0] for i in range(len(PROMPTS))]


def test_each_output_is_of_its_language(alone):
    place = json.loads(alone[0].text) if alone[0].finish_reason == "stop" else None
    assert place is None or (place["city"] in ("Paris", "of") and len(place["sizes"]) >= 3)
    assert re.match(r'\{ ?"city" ?: ?"', alone[0].text)
    assert re.fullmatch("[0-9]{3}-[a-c]{20,30}", alone[1].text)
    assert alone[2].text in ("crimson", "deep sea blue", "ü") and alone[2].finish_reason == "stop"
    assert re.match(r"\(*[0-9]{0,3}\)*$", alone[3].text)


def test_in_a_mixed_batch(llm, temperature, alone):
    assert tokens(generate(llm, temperature)) == tokens(alone)


def test_preempted_and_recomputed(engines, llama2_model, temperature, alone):
    with engines.borrow(llama2_model, num_pages=8, predicted_output_len=1) as engine, LLM(engine) as llm:
        outputs = generate(llm, temperature, times=2)
        assert engine.loop.scheduler.counters.preemptions > 0
    assert tokens(outputs) == tokens(alone) * 2


def test_recomputed_after_a_fault_of_the_device(llm, temperature, alone):
    loop = llm.engine.loop
    for i, prompt in enumerate(PROMPTS):
        llm.engine.submit(llm.engine.tokenizer.encode(prompt), params(i, temperature))
    requests = loop.unfinished
    for steps in range(400):
        if not loop.has_unfinished:
            break
        loop.step()
        if steps in (5, 9):
            loop.recover()
    assert loop.counters.faults >= 2
    assert [request.output_token_ids for request in requests] == tokens(alone)


def test_requests_without_adjustments_use_the_plain_programs(engines, llama2_model):
    with engines.borrow(llama2_model) as engine, LLM(engine) as llm:
        used = []
        sample = engine.runner._sample
        engine.runner._sample = lambda program, *others: (used.append(program.adjusted), sample(program, *others))[1]
        try:
            neutral = SamplingParams(max_tokens=4, temperature=1, presence_penalty=0, repetition_penalty=1, logit_bias={})
            llm.generate(PROMPTS, neutral)
            assert set(used) == {False}
            llm.generate(PROMPTS[:2], [neutral, SamplingParams(max_tokens=4, presence_penalty=0.1)])
            assert True in used
        finally:
            engine.runner._sample = sample


@pytest.mark.parametrize(
    ("fields", "bias", "penalty"),
    [
        ({"presence_penalty": 2.0}, {}, lambda count: 2.0 * (count > 0)),
        ({"frequency_penalty": 1.5}, {}, lambda count: 1.5 * count),
        ({"frequency_penalty": -2.0}, {}, lambda count: -2.0 * count),
        ({"logit_bias": {9: 3.0, 11: -2.0}}, {9: 3.0, 11: -2.0}, lambda count: 0.0),
    ],
)
def test_each_token_is_the_best_after_the_formula(llm, fields, bias, penalty):
    """Log-probabilities are the model's own, so the formula can be applied to them."""
    allowed = list(range(5, 65))
    asked = SamplingParams(temperature=0, max_tokens=24, allowed_token_ids=allowed, logprobs=20, ignore_eos=True, **fields)
    [output] = llm.generate(["The"], asked)
    drawn = output.outputs[0].token_ids
    plain = llm.generate(["The"], SamplingParams(temperature=0, max_tokens=24, allowed_token_ids=allowed, ignore_eos=True))
    assert drawn != plain[0].outputs[0].token_ids
    compared = 0
    for i, (token, position) in enumerate(zip(drawn, output.outputs[0].logprobs)):
        scores = {
            other: position[other].logprob - penalty(drawn[:i].count(other)) + bias.get(other, 0.0)
            for other in position
            if other in allowed
        }
        assert scores[token] >= max(scores.values()) - 1e-4
        compared += len(scores) > 1
    assert compared > 5


def test_a_repetition_penalty_counts_the_prompt(llm):
    prompt = llm.engine.tokenizer.encode("The capital of France")
    [output] = llm.generate("The capital of France", SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1e6))
    drawn = output.outputs[0].token_ids
    assert not set(prompt) & set(drawn) and len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_beyond_the_vocabulary_are_refused_with_the_field(llm, field):
    value = {512: 1.0} if field == "logit_bias" else [512]
    with pytest.raises(ValueError, match=f"{field}: token id 512 is out of range; allowed: 0 to 511"):
        llm.generate("The", SamplingParams(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "nothing is set; allowed: one of json, regex, choice, grammar, json_object"),
        ({"regex": "x", "choice": ["x"]}, "regex and choice is set; allowed: one of"),
        ({"json": "{"}, "json is '{'; allowed: a JSON schema"),
        ({"json": 3}, "json is 3; allowed: a JSON schema"),
        ({"json": {"x": float("nan")}}, "json is {'x': nan}; allowed: a JSON schema"),
        ({"json": {"type": "objct"}}, "it cannot be compiled: Invalid type: objct"),
        ({"regex": ""}, "regex is ''; allowed: a text that is not empty"),
        ({"regex": "("}, "regex is .*; it cannot be compiled"),
        ({"choice": []}, "choice is .*; allowed: a list of texts, none of them empty"),
        ({"choice": "red"}, "choice is 'red'; allowed: a list of texts"),
        ({"choice": 7}, "choice is 7; allowed: a list of texts"),
        ({"grammar": "start: x"}, 'grammar is .*; it cannot be compiled: .*unknown name: "x"'),
        ({"json_object": "yes"}, "json_object is 'yes'; allowed: true or null"),
        ({"regex": "x", "whitespace_pattern": " "}, "whitespace_pattern is set; allowed: only together with json"),
        ({"regex": "x" * 70000}, "regex has 70000 characters; allowed: 65536"),
    ],
)
def test_a_wrong_language_is_refused_with_the_reason_and_disturbs_nothing(llm, fields, reason):
    with pytest.raises(InvalidGrammar, match=f"^structured_outputs: .*{reason}"):
        llm.generate("The", SamplingParams(structured_outputs=StructuredOutputsParams(**fields)))
    assert len(llm.generate("The", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2


def test_a_language_too_complex_to_go_on_fails_its_request_alone(llm):
    """The grammar is compiled, and its first token leaves more alternatives than llguidance follows."""
    schema = {"anyOf": [{"type": "object", "properties": {f"name{i}": {"type": "integer"}}} for i in range(700)]}
    params = [
        SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(json=schema)),
        SamplingParams(max_tokens=8),
    ]
    failed, other = llm.generate(PROMPTS[:2], [dataclasses.replace(one, ignore_eos=True) for one in params])
    assert failed.outputs[
        0
    ].finish_reason == "error" and "its structured output could not go on: Parser Error: Current row has" in (
        failed.outputs[0].stop_reason
    )
    assert len(failed.outputs[0].stop_reason) < 600 and other.outputs[0].finish_reason == "length"


def test_thousands_of_choices(llm):
    choices = [f"{i:05d}" for i in range(5000)]
    params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(choice=choices))
    [output] = llm.generate("The", params)
    assert output.outputs[0].text in choices and output.outputs[0].finish_reason == "stop"


def test_grammars_that_were_used_longest_ago_are_dropped(llm, monkeypatch):
    monkeypatch.setattr("chameleon_jax.structured_outputs.MAX_COMPILED", 2)
    grammars, compiled = llm.engine.grammars, []
    compile_it = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda params: (compiled.append(params.regex), compile_it(params))[1])
    for regex in ("q", "r", "q", "s", "q", "r"):
        grammars.guide(StructuredOutputsParams(regex=regex))
    assert compiled == ["q", "r", "s", "r"]


def test_others_are_served_while_a_grammar_is_compiled(served, monkeypatch):
    grammars, begun, go_on = served.llm.engine.grammars, threading.Event(), threading.Event()
    compile_it = grammars._compile

    def slow(params: StructuredOutputsParams) -> object:
        begun.set()
        assert go_on.wait(TIMEOUT)
        return compile_it(params)

    monkeypatch.setattr(grammars, "_compile", slow)

    async def generate(params: SamplingParams) -> str:
        return [output async for output in served.llm.generate("The", params)][-1].outputs[0].text

    async def main() -> tuple[str, str]:
        guided = asyncio.create_task(
            generate(SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[0-9]{2}x")))
        )
        await asyncio.to_thread(begun.wait, TIMEOUT)
        other = await generate(SamplingParams(max_tokens=4, ignore_eos=True))
        assert not guided.done()
        go_on.set()
        return await guided, other

    text, other = run(main())
    assert re.fullmatch("[0-9]{2}x", text) and other


def test_a_language_that_cannot_go_on_is_a_failed_request_over_both_protocols(served):
    schema = {"anyOf": [{"type": "object", "properties": {f"name{i}": {"type": "integer"}}} for i in range(700)]}
    with pytest.raises(RequestFailed, match="its structured output could not go on: Parser Error: Current row has"):
        served.rpc.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)))
    with pytest.raises(openai.APIStatusError, match="its structured output could not go on") as error:
        served.openai.completions.create(model="llama2", prompt="x", extra_body={"guided_json": schema})
    assert error.value.status_code == 503


def test_allowed_ids_and_a_language_exclude_each_other():
    with pytest.raises(ValueError, match="allowed_token_ids is set; allowed: not together with structured_outputs"):
        SamplingParams(allowed_token_ids=[5], structured_outputs=StructuredOutputsParams(regex="a"))
