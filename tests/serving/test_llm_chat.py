"""`LLM.chat` with vLLM's parameters, the progress bar of a call, and the times of its outputs."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tqdm import tqdm

from chameleon_jax import LLM, SamplingParams
from tests import reference_models as reference

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(engines, text_model):
    with engines.borrow(text_model) as engine, LLM(engine) as llm:
        yield llm


def prompt_of(llm: LLM, *args, **kwargs) -> str:
    [output] = llm.chat(*args, GREEDY, **kwargs)
    return llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)


def test_chat_uses_the_models_template_or_another(llm):
    assert prompt_of(llm, HELLO) == "user: hello\nassistant:"
    own = "{{ mark }}{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{{ messages[-1].content }}"
    own += "{% if add_generation_prompt %}!{% endif %}"
    assert prompt_of(llm, HELLO, chat_template=own) == "hello!"
    assert prompt_of(llm, HELLO, chat_template=own, add_generation_prompt=False) == "hello"
    assert prompt_of(llm, HELLO, chat_template=own, chat_template_kwargs={"mark": "#"}) == "#hello!"
    tools = [{"type": "function", "function": {"name": "clock"}}]
    assert prompt_of(llm, HELLO, chat_template=own, tools=tools) == "<clock>hello!"


def test_chat_continues_the_last_message(llm):
    given = [*HELLO, {"role": "assistant", "content": "well"}]
    text = prompt_of(llm, given, add_generation_prompt=False, continue_final_message=True)
    assert text == "user: hello\nassistant: well"
    with pytest.raises(ValueError, match="add_generation_prompt is True; allowed: False"):
        llm.chat(given, GREEDY, continue_final_message=True)


def test_chat_joins_parts_of_text_and_refuses_others(llm):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert prompt_of(llm, [{"role": "user", "content": parts}]) == "user: hello\nassistant:"
    with pytest.raises(ValueError, match=r"content is \{'type': 'image_url'\}; allowed: text, or parts with text"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY)
    with pytest.raises(ValueError, match="cannot be compiled"):
        llm.chat(HELLO, GREEDY, chat_template="{% for %}")


def test_a_bar_counts_the_prompts_and_their_speed(llm):
    file, bars = io.StringIO(), []

    def make(**options):
        bars.append(tqdm(file=file, **options))
        return bars[-1]

    prompts = [reference.prompt(seed) for seed in range(3)]
    llm.generate(prompts, GREEDY, use_tqdm=make)
    [bar] = bars
    assert (bar.n, bar.total) == (3, 3) and file.getvalue().endswith("\n")
    assert "Processed prompts: 100%" in file.getvalue()
    speeds = re.search(r"est\. speed input: ([\d.]+) toks/s, output: ([\d.]+) toks/s", file.getvalue().split("\r")[-1])
    assert speeds is not None and float(speeds[1]) > float(speeds[2]) > 0
    llm.chat(HELLO, GREEDY, use_tqdm=make)
    assert bars[-1].n == 1


@pytest.mark.parametrize(("is_terminal", "use_tqdm", "shows"), [(True, True, True), (True, False, False), (False, True, False)])
def test_the_bar_is_for_terminals(llm, monkeypatch, is_terminal, use_tqdm, shows):
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    llm.generate([reference.prompt(1)], GREEDY, use_tqdm=use_tqdm)
    assert ("Processed prompts" in stderr.getvalue()) is shows


def test_a_failed_call_ends_its_bar(llm, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(llm.engine.loop, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([reference.prompt(1)], GREEDY, use_tqdm=lambda **options: tqdm(file=file, **options))
    assert file.getvalue().endswith("\n")


def test_metrics_are_filled_and_have_vllms_names(llm):
    [output] = llm.generate([reference.prompt(1)], GREEDY)
    metrics = output.metrics
    times = (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time)
    assert None not in times and list(times) == sorted(times)
    assert (metrics.scheduled_ts, metrics.first_token_ts) == times[1:3]
    assert metrics.time_in_queue == times[1] - times[0]
    assert metrics.first_token_latency == times[2] - times[0] > 0
