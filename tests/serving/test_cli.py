"""The command line as a user types it, on a small model written to disk."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from chameleon_jax.serving.cli import app
from tests import reference_models as reference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), "tied")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("generate", "finetune", "convert", "bench"):
        assert command in result.output
        assert "Example: chameleon-jax" in run(command, "--help").output


def test_convert_to_orbax_and_back(model, tmp_path):
    assert run("convert", model, tmp_path / "orbax").exit_code == 0
    assert run("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf").exit_code == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_bench_reports_json(model, tmp_path):
    adapter = reference.save_adapter(tmp_path / "a", reference.CONFIGS["tied"], 4)
    options = ["--prompt-len", 20, "--output-len", 3, "--num-requests", 3, "--max-num-seqs", 2, "--json"]
    result = run("bench", model, "--lora-modules", f"a={adapter}", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["requests"] == 3 and report["adapters"] == 1 and report["output_tokens_per_s"] > 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("convert", "/nowhere.gguf", "out"), "no such file"),
        (("convert", "MODEL", "out", "--to", "onnx"), "allowed: orbax, hf"),
        (("generate", "MODEL", "--prompt", "x", "--lora-modules", "a"), "allowed: name=directory"),
        (("finetune", "MODEL", "--text", "/nowhere", "--output", "out"), "No such file"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(model, arguments, message):
    result = run(*(model if a == "MODEL" else a for a in arguments))
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
