"""A conversation over a pipe: history, adapters, commands, and answers that come in parts."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.serving.cli.chat import Chat

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(engines, text_model, adapter_dir):
    with engines.borrow(text_model) as engine, LLM(engine) as llm:
        llm.add_lora("a1", adapter_dir / "a1")
        yield llm


@pytest.fixture
def talk(llm, monkeypatch, capsys):
    """Runs a conversation. Returns its answers, its notes and the parts in which the answers were written."""

    def run(*lines: str, adapter: str | None = None, params: SamplingParams = PARAMS) -> SimpleNamespace:
        parts: list[str] = []
        stdout = SimpleNamespace(write=parts.append, flush=lambda: None)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        monkeypatch.setattr(sys, "stdout", stdout)
        Chat(llm, params, adapter).run()
        return SimpleNamespace(text="".join(parts), parts=parts, notes=capsys.readouterr().err)

    return run


def answer(llm, *texts: str, lora: str | None = None) -> str:
    """Answer to a conversation: texts of the user and of the assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return llm.chat(messages, PARAMS, None if lora is None else LoRARequest(lora))[0].outputs[0].text


def test_answers_know_the_conversation_and_come_in_parts(llm, talk):
    first = answer(llm, "hi")
    second = answer(llm, "hi", first, "go on")
    told = talk("hi", "", "go on")
    assert told.text == f"{first}\n{second}\n"
    assert len([part for part in told.parts if part.strip("\n")]) > 2


def test_commands_change_the_adapter_forget_and_end(llm, talk):
    base, adapted = answer(llm, "hi"), answer(llm, "hi", lora="a1")
    told = talk("hi", "/reset", "/adapter a1", "hi", "/reset", "/adapter", "hi", "/exit", "hi")
    assert base != adapted and told.text == f"{base}\n{adapted}\n{base}\n"
    assert talk("hi", adapter="a1").text == f"{adapted}\n"


def test_mistakes_leave_the_conversation_as_it_was(llm, talk):
    first = answer(llm, "hi")
    told = talk("hi", "/adapter x", "/what", "y" * 200, "go on")
    assert told.text == f"{first}\n{answer(llm, 'hi', first, 'go on')}\n"
    notes = " ".join(told.notes.split())
    assert "adapter is 'x'; allowed: a1" in notes and "command is '/what'; allowed: /adapter NAME" in notes
    assert "/reset forgets it" in notes


def test_control_c_ends_an_answer_and_not_the_conversation(llm, talk, monkeypatch):
    step, steps = llm.engine.loop.step, []

    def interrupt() -> list:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine.loop, "step", interrupt)
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    told = talk("hi", "/reset", "hi", params=long)
    first, second = told.text.splitlines()[0], told.text.splitlines()[-1]
    assert len(told.text) < 100 and second.startswith(first)
