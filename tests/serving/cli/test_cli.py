"""The command line as a user types it, on a small model written to disk."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import chameleon_jax
from chameleon_jax import SamplingParams
from chameleon_jax.checkpoints import length_proxy
from chameleon_jax.config import EngineConfig
from chameleon_jax.serving.cli import app
from chameleon_jax.serving.cli.serve import _greet, _listed
from chameleon_jax.serving.service.server_config import ServerConfig
from tests import reference_models as reference
from tests.serving import text_calls
from tests.serving.cli.command_line import run
from tests.text_models import PROMPT


def commands(group: Any = None, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its name, those of groups among them."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for path, _ in commands():
        assert path[0] in result.output
        assert "Example: chameleon-jax " + " ".join(path) in " ".join(run(*path, "--help").output.split())


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_help_of_a_group_has_each_command_s_whole_line(monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in run(*group, "--help").output.partition("Commands:")[2]


def test_every_option_and_argument_has_a_help_text():
    for path, command in commands():
        for option in command.params:
            assert option.help and option.help.endswith("."), f"{option.opts} of {path} has no help text"


def test_help_fits_80_columns_with_every_option_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for path, command in commands():
        lines = run(*path, "--help").output.splitlines()
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
        words = " ".join(lines).split()
        assert [o for option in command.params for o in (*option.opts, *option.secondary_opts) if o not in words] == []


def test_convert_to_orbax_and_back(model, tmp_path):
    assert run("convert", model, tmp_path / "orbax").exit_code == 0
    assert run("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf").exit_code == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_outputs_are_overwritten_with_force_only(model, tmp_path):
    output = tmp_path / "out"
    assert run("convert", model, output).exit_code == 0
    (output / "notes").write_text("mine")
    before = sorted(output.rglob("*"))
    text = tmp_path / "text"
    text.write_text("text")
    for command in (
        ("convert", model, output, "--to", "hf"),
        ("finetune", model, "--text", text, "--output", output),
        ("train-length-proxy", model, "--data", text, "--output", output),
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert "; allowed: a new or empty directory; --force overwrites" in " ".join(result.output.split())
    assert sorted(output.rglob("*")) == before
    result = run("finetune", model, "--text", text, "--output", text, "--force")
    assert result.exit_code == 1 and "allowed: a directory; it is a file" in " ".join(result.output.split())
    assert run("convert", model, output, "--to", "hf", "--force").exit_code == 0
    assert (output / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not (output / "orbax_weights").exists() and (output / "notes").read_text() == "mine"


def test_a_model_is_not_converted_over_itself(model):
    before = (model / "model.safetensors").read_bytes()
    result = run("convert", model, model, "--to", "hf", "--force")
    assert result.exit_code == 1 and "allowed: another directory than the model's" in " ".join(result.output.split())
    assert (model / "model.safetensors").read_bytes() == before


def test_bench_reports_json(model, tmp_path):
    adapter = reference.save_adapter(tmp_path / "a", reference.CONFIGS["tied"], 4)
    options = ["--prompt-len", 20, "--output-len", 3, "--num-requests", 3, "--max-num-seqs", 1, "--json"]
    options += ["--max-num-batched-tokens", 32]
    result = run("bench", "throughput", model, "--lora-modules", f"a={adapter}", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["requests"] == 3 and report["adapters"] == 1 and report["output_tokens_per_s"] > 0


def test_train_length_proxy_saves_what_it_measured(model, tmp_path):
    data = tmp_path / "requests.jsonl"
    examples = [{"prompt_token_ids": [1 + i % 2] * (5 + i % 4), "output_len": 10 + 500 * (i % 2)} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, examples)))
    options = ["--data", data, "--output", tmp_path / "proxy", "--class-cuts", "141", "--window", 32, "--learning-rate", 0.01]
    result = run("train-length-proxy", model, *options)
    assert result.exit_code == 0, result.output
    proxy = length_proxy.load(tmp_path / "proxy")
    assert f"held-out accuracy {proxy.accuracy:.3f} of 8 examples" in result.stdout
    assert proxy.predict_lens([[1] * 6, [2] * 6]).tolist() == [10, 510]


FLAGS = {
    "host": "::1",
    "port": 1,
    "grpc_port": 2,
    "served_model_name": ("m",),
    "allowed_origins": ("https://a",),
    "allowed_methods": ("GET",),
    "allowed_headers": ("x-a",),
    "allow_credentials": True,
    "max_metric_adapters": 12,
    "vllm_metrics": False,
    "api_keys": ("k",),
    "admin_keys": ("a",),
    "adapter_dirs": ("d",),
    "hub_adapters": ("h/b",),
    "adapter_urls": ("s3://bucket/b",),
    "tls_cert": "c.pem",
    "tls_key": "k.pem",
    "request_timeout": 1.5,
    "drain_timeout": 2.5,
    "max_body_bytes": 2048,
    "max_header_bytes": 4096,
    "load_on_request": False,
    "max_connections": 7,
    "max_choices": 3,
    "tool_call_parser": "mistral",
    "chat_template": "{{ messages }}",
    "trust_request_chat_template": True,
    "dtype": "bfloat16",
    "load_format": "dummy",
    "generation_config": "none",
    "max_model_len": 99,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 64,
    "max_lora_rank": 9,
    "lora_host_bytes": 123,
    "num_pages": 77,
    "gpu_memory_utilization": 0.5,
    "page_tokens": 8,
    "enable_lora": False,
    "enable_lora_extras": True,
    "compile_programs": "lazy",
    "system": "fifo",
    "ttft_slo": 3.5,
    "tbt_slo": 0.25,
    "predicted_output_len": 11,
    "length_proxy": "p",
    "max_queue_len": 6,
    "seed": 42,
}
"""A value other than the default for each setting of a server and its engine."""
SINGULAR = {
    "api_keys": "api_key",
    "admin_keys": "admin_key",
    "adapter_dirs": "adapter_dir",
    "hub_adapters": "hub_adapter",
    "adapter_urls": "adapter_url",
}
"""Names of the flags that are repeated for each value."""


def test_serve_has_a_flag_for_every_setting(monkeypatch):
    arguments = []
    for field, value in FLAGS.items():
        flag = SINGULAR.get(field, field).replace("_", "-")
        switch = f"--no-{flag}" if value is False else f"--{flag}"
        arguments += [switch] if isinstance(value, bool) else [switch, value[0] if isinstance(value, tuple) else value]
    given = []
    module = sys.modules[_greet.__module__]  # the package's name `serve` is the command
    monkeypatch.setattr(module, "_serve", lambda *args: given.append(args))
    result = run("serve", "MODEL", *arguments)
    assert result.exit_code == 0, result.output
    [(_, config, settings, *_)] = given
    got = dataclasses.asdict(config) | dataclasses.asdict(EngineConfig(**settings))
    assert got == FLAGS  # so FLAGS has every setting
    defaults = dataclasses.asdict(ServerConfig()) | dataclasses.asdict(EngineConfig())
    assert all(defaults[field] != value for field, value in FLAGS.items())


def test_lists_are_repeated_flags_or_json_as_for_vllm():
    assert _listed("allowed_origins", ["https://a", '["https://b", "*"]']) == ("https://a", "https://b", "*")
    assert _listed("allowed_origins", None) == ()


def test_version():
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"chameleon-jax {chameleon_jax.__version__}\n"


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("0", "0")])
def test_alarms_of_the_compiler_are_not_shown_unless_asked_for(monkeypatch, given, expected):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")  # so that it is restored
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    if given is not None:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", given)
    run("convert", "/nowhere.gguf", "out")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == expected


def test_no_module_of_the_command_line_imports_jax_before_a_command_runs():
    code = "import sys, chameleon_jax.serving.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_adapter_names_are_not_markup(text_model, adapter_dir):
    result = run("generate", text_model, "--prompt", "x", "--lora-modules", f"[/x]={adapter_dir}/a0", "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "[/x]" in result.output.splitlines()


def test_generate_continues_its_prompt(llama2_model, served):
    expected = text_calls.ask(served, PROMPT, SamplingParams(temperature=0, max_tokens=9))[-1].outputs[0].text
    result = run("generate", llama2_model, "--prompt", PROMPT, "--max-tokens", 9)
    assert result.exit_code == 0 and expected.startswith(" ")
    assert result.stdout.endswith(f"\n{expected}\n") or result.stdout == f"{expected}\n"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_greeting_has_addresses_and_commands(capsys, host, shown):
    async def list_loras() -> list[str]:
        return ["[/x]'s", "[red]"]

    service = SimpleNamespace(config=ServerConfig(host=host), model_name="base", llm=SimpleNamespace(list_loras=list_loras))
    asyncio.run(_greet(service, SimpleNamespace(port=8000, grpc_port=8001)))
    said = capsys.readouterr().err
    assert f"http://{shown}:8000/v1/completions" in said and f"{shown}:8001" in said
    assert "[/x]'s, [red]" in " ".join(said.split())
    bodies = [shlex.split(line)[-1] for line in said.splitlines() if "curl" in line]
    assert [json.loads(body)["model"] for body in bodies] == ["base", "[/x]'s"]
