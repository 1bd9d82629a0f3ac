"""Settings of a server: addresses, keys and limits, checked once."""

from __future__ import annotations

import dataclasses
import math
import re

from chameleon_jax.checkpoints.chat_template import ChatTemplate, operators_template
from chameleon_jax.checks import require
from chameleon_jax.serving.tools.styles import STYLES

MAX_NAME_LEN = 256
"""Characters of a model's or an adapter's name."""

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
URL = re.compile(r"[a-z][a-z0-9+.-]*://(?!.*::)[^/\s?#][^\s?#]*")
LEAST = {"max_body_bytes": 1024, "max_header_bytes": 1024, "max_connections": 1, "max_choices": 1, "max_metric_adapters": 0}


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of one server.

    Attributes:
        host: Address to listen on.
        port: HTTP port. 0 picks a free one.
        grpc_port: gRPC port. 0 picks a free one; None serves no gRPC.
        served_model_name: Names of the base model in requests. Answers and metrics have the first. Without any, it is taken
            from the path or id that the model was loaded from.
        api_keys: Keys, of which every request for models, completions or the status page's data must send one as
            `Authorization: Bearer KEY`. Without any, the server is open. Keys hold no spaces, as spaces separate the keys in an
            environment variable.
        admin_keys: Keys for loading and unloading adapters, required as soon as the server has a key of either kind. An admin
            key also serves as an API key.
        adapter_dirs: Directories below which clients may name adapters. Adapters directly inside are loaded at the start.
        hub_adapters: Hub ids from which clients may load adapters: `owner/repository`, or `owner/repository/subfolder`.
        adapter_urls: URLs of adapters, or of folders of adapters, that clients may load, as `s3://bucket/adapters`.
        load_on_request: Whether a request loads the adapter that it names: one of `hub_adapters`, a path below one of
            `adapter_dirs`, or one of `adapter_urls` or below it. Otherwise only adapters that were loaded before are served.
        allowed_origins: Origins whose pages may read answers in a browser (CORS), as `https://app.example`; "*" allows any.
        allowed_methods: Methods that such pages may use; "*" allows all.
        allowed_headers: Headers that such pages may send; "*" allows all.
        allow_credentials: Whether such pages may send cookies and HTTP authentication.
        tls_cert: PEM file of the certificate for both protocols. None serves without TLS.
        tls_key: PEM file of the certificate's key.
        request_timeout: Most seconds a request may take, and the default for requests without a deadline.
        drain_timeout: Seconds that running requests get to finish when the server stops.
        max_body_bytes: Bytes of the body of an HTTP request, and of a gRPC message.
        max_header_bytes: Bytes of the head of an HTTP request.
        max_connections: HTTP connections served at once.
        max_choices: Choices of one request: its prompts times `n`.
        max_metric_adapters: Adapters with metrics of their own; further ones are counted as "other".
        vllm_metrics: Whether metrics that vLLM has too are also published under its names.
        tool_call_parser: Style in which the model writes tool calls: hermes, llama3_json or mistral. None guesses it.
        chat_template: Chat template of all conversations, as a file or as text. None takes the model's.
        trust_request_chat_template: Whether clients may send a chat template with a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    admin_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    adapter_dirs: tuple[str, ...] = ()
    hub_adapters: tuple[str, ...] = ()
    adapter_urls: tuple[str, ...] = ()
    load_on_request: bool = True
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    request_timeout: float = 600.0
    drain_timeout: float = 60.0
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 16 << 10
    max_connections: int = 1024
    max_choices: int = 16
    max_metric_adapters: int = 100
    vllm_metrics: bool = True
    tool_call_parser: str | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(self.grpc_port is None or 0 <= self.grpc_port < 65536, "grpc_port", self.grpc_port, "0 to 65535")
        require(not self.port or self.grpc_port != self.port, "grpc_port", self.grpc_port, "another than port")
        names = self.served_model_name
        valid = all(0 < len(name) <= MAX_NAME_LEN and name.isprintable() for name in names) and len(set(names)) == len(names)
        require(valid, "served_model_name", names, f"different names of 1 to {MAX_NAME_LEN} printable characters")
        for field in ("api_keys", "admin_keys"):  # HTTP headers carry no other characters
            valid = all(re.fullmatch("[!-~]+", key) for key in getattr(self, field))
            require(valid, field, "...", "printable ASCII without spaces, not empty")
        require((self.tls_cert is None) == (self.tls_key is None), "tls_key", self.tls_key, "given together with tls_cert")
        for field in ("request_timeout", "drain_timeout"):
            value = getattr(self, field)
            require(0 < value < math.inf, field, value, "above 0 seconds, finite")
        for url in self.adapter_urls:
            require(URL.fullmatch(url) is not None, "adapter_urls", url, "SCHEME://FOLDER without ::, ? and #")
        for origin in self.allowed_origins:
            require(
                origin == "*" or ORIGIN.fullmatch(origin) is not None, "allowed_origins", origin, "*, or as https://HOST[:PORT]"
            )
        for field, least in LEAST.items():
            require(getattr(self, field) >= least, field, getattr(self, field), f"{least} or more")
        parsers = (None, *STYLES)
        require(self.tool_call_parser in parsers, "tool_call_parser", self.tool_call_parser, ", ".join(STYLES))
        if self.chat_template is not None:
            source, place = operators_template(self.chat_template)
            if (error := ChatTemplate(source, {}, place).error) is not None:
                raise ValueError(f"chat_template: {error}")
