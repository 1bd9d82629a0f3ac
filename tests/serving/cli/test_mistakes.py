"""Mistakes on the command line: found early, and told in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from chameleon_jax.serving.cli.model_check import check_model
from tests.serving.cli.command_line import run

WITHOUT_JAX = """
import json, sys
sys.modules["jax"] = None
from typer.testing import CliRunner
from chameleon_jax.serving.cli import app
for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([result.exit_code, type(result.exception).__name__, result.output]), flush=True)
"""


@pytest.fixture(scope="module")
def without_jax() -> Iterator[subprocess.Popen[str]]:
    """Process that runs each line of arguments, and in which nothing can import JAX."""
    command = [sys.executable, "-c", WITHOUT_JAX]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help"], ""),
        (["serve", "MODEL", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["serve", "MODEL", "--port", "-2"], "port is -2"),
        (["serve", "MODEL", "--lora-modules", "a=/nowhere"], "adapter 'a', /nowhere: nowhere has no adapter_config.json"),
        (["serve", "MODEL", "--adapter-dir", "/nowhere"], "adapter_dir is '/nowhere'; allowed: a directory"),
        (["serve", "/nowhere"], "model is '/nowhere': no such file or directory; presets: smollm2-135m"),
        (["serve", "tinny", "--load-format", "dummy"], "did you mean 'tiny'?"),
        (["generate", "/nowhere.gguf", "--prompt", "x"], "model is '/nowhere.gguf': no such file or directory"),
        (["generate", "MODEL"], "prompt is None; allowed: text, or --chat"),
        (["generate", "MODEL", "--prompt", "x", "--lora", "a"], "lora is 'a'; allowed: an adapter of --lora-modules"),
        (["bench", "throughput", "FOLDER"], "allowed: a GGUF file, or a directory with config.json"),
        (["bench", "serve", "--base-url", "localhost"], "base_url is 'localhost'; allowed: http://host:port"),
        (["convert", "/nowhere", "out"], "model is '/nowhere'"),
        (["finetune", "/nowhere", "--text", "TEXT", "--output", "out"], "model is '/nowhere'"),
        (["train-length-proxy", "MODEL", "--data", "/nowhere", "--output", "out"], "data is '/nowhere'"),
    ],
)
def test_mistakes_are_found_before_jax_is_imported(without_jax, model, tmp_path, arguments, message):
    text = tmp_path / "text"
    text.write_text("text")
    places = {"MODEL": str(model), "FOLDER": str(tmp_path), "TEXT": str(text)}
    print(json.dumps([places.get(a, a) for a in arguments]), file=without_jax.stdin, flush=True)
    code, raised, output = json.loads(without_jax.stdout.readline())
    assert message in output and raised in ("NoneType", "SystemExit"), output
    assert code == (1 if message else 0)


def test_a_hub_id_is_looked_up_in_the_cache_and_then_on_the_hub(monkeypatch):
    asked = []

    def cached(name: str, local_files_only: bool) -> str:
        if name == "cached/model":
            return "folder"
        raise hub_errors.LocalEntryNotFoundError("not cached")

    def info(name: str, timeout: float) -> None:
        asked.append(name)
        if name == "no/such":
            raise hub_errors.RepositoryNotFoundError.__new__(hub_errors.RepositoryNotFoundError)
        if name == "un/reachable":
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.setattr(huggingface_hub, "model_info", info)
    check_model("cached/model")
    check_model("on-hub/model")
    assert asked == ["on-hub/model"]
    with pytest.raises(ValueError, match="'no/such': no such file or directory, and the hub has no such model"):
        check_model("no/such")
    with pytest.raises(ValueError, match=r"the hub cannot be reached \(Name or service not known\)"):
        check_model("un/reachable")
    with pytest.raises(ValueError, match=r"did you mean 'smollm2-135m'\?"):
        monkeypatch.setattr(huggingface_hub, "model_info", lambda *args, **kwargs: info("no/such", 0))
        check_model("smollm2-135mm")


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
        (("generate", "MODEL", "--prompt", "x", "--temperature", "-1"), "temperature is -1.0; allowed: 0 to 100"),
        (("generate", "MODEL", "--prompt", "x", "--max-tokens", "0"), "max_tokens is 0; allowed: 1 or more"),
        (("bench", "throughput", "MODEL", "--num-requests", "0"), "num_requests is 0; allowed: 1 or more"),
        (("bench", "throughput", "MODEL", "--prompt-len", "0"), "prompt_len is 0; allowed: 1 or more"),
        (("bench", "throughput", "MODEL", "--output-len", "0"), "output_len is 0; allowed: 1 or more"),
        (("serve", "MODEL", "--api-key", ""), "api_keys is '...'; allowed: printable ASCII without spaces, not empty"),
        (("serve", "MODEL", "--admin-key", "two words"), "admin_keys is '...'"),
        (("serve", "MODEL", "--max-choices", "0"), "max_choices is 0; allowed: 1 or more"),
        (("serve", "MODEL", "--allowed-origins", "a.example"), "allowed_origins is 'a.example'; allowed: *, or as https://"),
        (("serve", "MODEL", "--allowed-methods", "[1]"), "allowed_methods is ['[1]']; allowed: texts, or a JSON list"),
        (("serve", "MODEL", "--allowed-headers", '["a"'), "allowed: texts, or a JSON list of texts"),
        (
            ("serve", "MODEL", "--served-model-name", "m", "--served-model-name", "a", "--lora-modules", "a=MODEL"),
            "lora_modules is 'a'; allowed: names that the base model does not have",
        ),
        (("serve", "MODEL", "--host", "nosuchhost.invalid"), "host is 'nosuchhost.invalid'"),
        (("serve", "MODEL", "--lora-modules", "a=x", "b=y"), "(b=y); --lora-modules takes one adapter: repeat it for each"),
        (("serve", "--lora-modules=a=x", "b=y", "MODEL"), "; --lora-modules takes one adapter: repeat it for each"),
        (("convert", "MODEL", "out", "more"), "unexpected extra arguments (more)"),
        (("convert", "/nowhere[/x][red].gguf", "out"), "/nowhere[/x][red].gguf"),  # no markup
        (("generate", "MODEL", "--prompt", "x", "--lora-modules", "[/x]"), "'[/x]'"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(model, arguments, message):
    result = run(*(model if a == "MODEL" else a for a in arguments))
    assert result.exit_code != 0
    output = " ".join(result.output.replace("│", " ").split())  # typer draws boxes around its own errors
    assert message in output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("variable", ["CHAMELEON_API_KEY", "CHAMELEON_ADMIN_KEY"])
@pytest.mark.parametrize("text", ["", " "])
def test_a_variable_for_keys_that_is_empty_does_not_open_the_server(model, monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    result = run("serve", model)
    assert result.exit_code == 1
    assert f"{variable} is {text!r}; allowed: keys" in " ".join(result.output.split())
