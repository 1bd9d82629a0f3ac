"""Patterns of strangers match as in `re`, and are given up when they take too long."""

from __future__ import annotations

import re
import subprocess
import threading
import time

import pytest

from chameleon_jax.checkpoints import patterns

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


@pytest.mark.parametrize("form", ["%s", r"(.*\.)?(%s)$"])
@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "mlp.down_proj",
        r"layers\.1\.mlp\.down_proj",
        "^model$",
        r".*\.(q|v)_proj",
        r"(?:.*\.)?[5-9]\..*",
        "(a|a)*",
        "",
        "-",
    ],
)
def test_patterns_match_as_in_re(pattern, form):
    expected = {name for name in NAMES if re.fullmatch(form % pattern, name)}
    assert patterns.matches([pattern, "x"], NAMES, form) == {pattern: expected, "x": frozenset()}


def test_plain_names_need_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert patterns.matches(["q_proj", r"v\.x"], ["q_proj"], "%s") == {"q_proj": {"q_proj"}, r"v\.x": frozenset()}


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", r"\q", "(?P<x", "[z-a]", "\\"])
def test_invalid_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="is no pattern"):
        patterns.matches(["q_proj", pattern], NAMES, "%s")


@pytest.mark.parametrize("pattern", [r"(.*)*(.*)*(.*)*x", r"(\w|.)*" * 30 + "x"])
def test_endless_patterns_time_out_while_other_threads_run(pattern, monkeypatch):
    """Another thread goes on meanwhile, since this interpreter is not busy."""
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.5)
    beats, done = [0], threading.Event()

    def beat():
        while not done.wait(0.005):
            beats[0] += 1

    heart = threading.Thread(target=beat)
    heart.start()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"more than 0.5 s"):
        patterns.matches([pattern], NAMES, "%s")
    done.set()
    heart.join()
    assert beats[0] > 10 and time.monotonic() - begin >= 0.5
