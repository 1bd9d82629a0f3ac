"""The command line as a user types it, on a small model written to disk."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from chameleon_jax.checkpoints import length_proxy
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
    for command in ("generate", "finetune", "train-length-proxy", "convert", "bench"):
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


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "Expecting property name"),
        ("[]", r"the line is \[\]; allowed: an object"),
        ('{"output_len": 3}', "fields are output_len; allowed: output_len, and one of"),
        ('{"prompt_token_ids": [1], "output_len": 0}', "output_len is 0; allowed: an integer from 1"),
        ('{"prompt_token_ids": [1], "output_len": true}', "output_len is True"),
        ('{"prompt_token_ids": [1, 256], "output_len": 3}', r"prompt_token_ids\[1\] is 256; allowed: an id from 0 to 255"),
        ('{"prompt_token_ids": [], "output_len": 3}', r"prompt_token_ids is \[\]"),
        ('{"prompt": "", "output_len": 3}', "prompt is ''"),
        ('{"prompt": "hello", "output_len": 3}', "the model has no tokenizer"),
    ],
)
def test_train_length_proxy_names_the_line(model, tmp_path, line, message):
    data = tmp_path / "d"
    data.write_text('{"prompt_token_ids": [1], "output_len": 3}\n\n' + line)
    result = run("train-length-proxy", model, "--data", data, "--output", tmp_path / "proxy")
    assert result.exit_code == 1
    assert re.search(rf"d:3: .*({message})".replace(" ", ""), re.sub(r"\s", "", result.output))  # rich wraps lines


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
