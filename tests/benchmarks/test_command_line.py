"""One command line for all benchmarks: it lists them, explains each, and refuses wrong input in one line."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import BENCHMARKS, command, main


def test_the_list_names_every_benchmark(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and summary in printed for name, (_, summary) in BENCHMARKS.items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_list_has_the_first_line_of_each_help(name, capsys):
    module, summary = BENCHMARKS[name]
    assert inspect.getdoc(importlib.import_module(f"benchmarks.{module}").main).splitlines()[0] == summary
    assert main([name, "--help"]) == 0
    assert f"python -m benchmarks {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_and_argument_has_a_help_text_that_tells_its_default(name):
    for option in command(name).params:
        assert option.help and option.help.endswith("."), f"{option.opts} of {name} has no help text"
        shown = option.required or option.default is not None  # typer prints these itself
        assert shown or "default" in option.help, f"{option.opts} of {name} does not tell its default"


def test_the_table_of_questions_names_every_benchmark():
    rows = (Path(benchmarks.__file__).parent / "README.md").read_text().splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == list(BENCHMARKS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "no benchmark is named 'nonsense'; allowed: demo, "),
        ("workload --nonsense", "No such option: --nonsense"),
        ("workload --rps fast", "Invalid value for '--rps'"),
        ("simulate --profile nonsense", "--profile is 'nonsense'; allowed: a40-llama-7b, "),
        ("paper --headline --figure 2", "--figure is '2'; allowed: no figure with --headline"),
        ("peers --peer nonsense", "--peer is nonsense; allowed: vllm, transformers"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words, message, capsys):
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
