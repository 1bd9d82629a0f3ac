"""Comparison of chat templates with transformers: every construct, and the files that may hold templates."""

from __future__ import annotations

import copy
import json

import pytest
import transformers

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests.checkpoints import samples
from tests.checkpoints.chat_templates import CASES, SPECIAL_TOKENS

MESSAGES = [{"role": "user", "content": "hi"}]
TOKEN = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TOKENS = "{{ bos_token }}|{{ eos_token }}|{{ add_bos_token }}|{{ image_token }}|{{ fim_token }}|{{ pad_token }}"


@pytest.mark.parametrize("case", CASES)
def test_constructs_give_the_text_that_is_written_down(case):
    backend = samples.byte_level().backend
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=case.template, **SPECIAL_TOKENS)
    options = {"add_generation_prompt": True} | case.options
    try:
        text = tokenizer.apply_chat_template(copy.deepcopy(case.messages), tokenize=False, **options)
    except Exception:
        text = None
    assert text == case.text


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": "config"}},
        {"tokenizer_config.json": {"chat_template": {"default": "config", "rag": "no"}}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "config"}]}},
        {"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "Grüße\r\n\n"},
        {"chat_template.jinja": "jinja", "additional_chat_templates/tool_use.jinja": "no"},
        {"chat_template.jinja": "jinja", "additional_chat_templates/default.jinja": "named"},
        {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True, "pad_token": None, "fim_token": "<unk>"}},
        {"tokenizer_config.json": {"bos_token": TOKEN, "additional_special_tokens": ["<unk>"]}},
        {"tokenizer_config.json": {"bos_token": TOKEN, "extra_special_tokens": {"image_token": "<unk>"}}},
        {"tokenizer_config.json": {"extra_special_tokens": {"image_token": TOKEN}}},
        {"special_tokens_map.json": {"bos_token": {k: v for k, v in TOKEN.items() if k != "__type"}, "eos_token": "</s>"}},
        {
            "tokenizer_config.json": {"bos_token": "<unk>", "added_tokens_decoder": {"0": {"content": "<unk>"}}},
            "special_tokens_map.json": {"bos_token": "<s>"},
        },
    ],
)
def test_files_of_a_checkpoint(files, tmp_path):
    samples.byte_level().backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOKENS} | files.get("tokenizer_config.json", {})
    for name, content in (files | {"tokenizer_config.json": config}).items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.apply_chat_template(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
