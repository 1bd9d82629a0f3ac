"""Invalid settings of a server are named in the error."""

from __future__ import annotations

import pytest

from chameleon_jax.serving.service.server_config import ServerConfig


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"port": -1}, "port is -1"),
        ({"grpc_port": 65536}, "grpc_port is 65536"),
        ({"port": 8000, "grpc_port": 8000}, "grpc_port is 8000; allowed: another than port"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"api_keys": ("two words",)}, "api_keys"),
        ({"admin_keys": ("key ",)}, "admin_keys"),
        ({"admin_keys": ("schlüssel",)}, "admin_keys"),
        ({"tls_cert": "cert.pem"}, "tls_key"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"drain_timeout": float("nan")}, "drain_timeout"),
        ({"max_body_bytes": 10}, "max_body_bytes"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_choices": 0}, "max_choices"),
        ({"max_metric_adapters": -1}, "max_metric_adapters is -1; allowed: 0 or more"),
        ({"served_model_name": ("a", "a")}, "served_model_name is .*; allowed: different names"),
        ({"served_model_name": ("",)}, "served_model_name"),
        ({"adapter_urls": ("s3:/bucket",)}, "adapter_urls is 's3:/bucket'; allowed: SCHEME://FOLDER"),
        ({"adapter_urls": ("simplecache::s3://bucket",)}, "adapter_urls"),
        ({"adapter_urls": ("s3://bucket/a::file:///etc",)}, "adapter_urls"),
        ({"adapter_urls": ("https://host/?a=",)}, "adapter_urls"),
        ({"allowed_origins": ("https://a/",)}, "allowed_origins is 'https://a/'; allowed: "),
        ({"tool_call_parser": "xml"}, "tool_call_parser is 'xml'; allowed: hermes, mistral, llama3_json"),
        ({"chat_template": "no/file.jinja"}, "chat_template is 'no/file.jinja'; allowed: a file, or the text of a template"),
        ({"chat_template": "a\n{% for"}, "chat_template: the chat template cannot be compiled: .*line 2"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ServerConfig(**settings)


def test_a_chat_template_is_a_file_or_text(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages")
    with pytest.raises(ValueError, match=r"chat\.jinja, line 1"):
        ServerConfig(chat_template=str(file))
    file.write_text("no expression")
    ServerConfig(chat_template=str(file))
    ServerConfig(chat_template="{{ messages }}")


def test_keys_are_not_shown():
    with pytest.raises(ValueError) as error:
        ServerConfig(api_keys=("geheim\n",))
    assert "geheim" not in str(error.value)
    assert "geheim" not in repr(ServerConfig(api_keys=("geheim",), admin_keys=("geheim",)))
