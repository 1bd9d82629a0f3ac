"""How a server is set up: what it listens on, who may use it, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re

from chameleon_jax.checks import require


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of one server.

    Attributes:
        host: address to listen on.
        port: of HTTP; 0: any that is free.
        grpc_port: of gRPC; 0: any that is free; None: no gRPC.
        served_model_name: what requests call the base model; None: what it was loaded as.
        api_keys: one of them must come with every request but health, as `Authorization: Bearer KEY`; none: open to all.
            Without spaces, as these are between the keys of an environment variable.
        admin_keys: loading and unloading adapters needs one of them as soon as there is a key of either kind. They may also do
            what `api_keys` may.
        adapter_dirs: directories below which clients may name adapters; those directly in them are named at the start.
        hub_adapters: hub ids that clients may name.
        tls_cert, tls_key: PEM files for both protocols; None: no TLS.
        request_timeout: seconds that a request may take at most, and does where it names no deadline.
        drain_timeout: seconds that running requests are given when the server stops.
        max_body_bytes: of an HTTP request and of a gRPC message.
        max_header_bytes: of an HTTP request.
        max_connections: of HTTP that are served at once.
        max_choices: of `n`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    admin_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    adapter_dirs: tuple[str, ...] = ()
    hub_adapters: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    request_timeout: float = 600.0
    drain_timeout: float = 60.0
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 16 << 10
    max_connections: int = 1024
    max_choices: int = 16

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(self.grpc_port is None or 0 <= self.grpc_port < 65536, "grpc_port", self.grpc_port, "0 to 65535")
        require(not self.port or self.grpc_port != self.port, "grpc_port", self.grpc_port, "another than port")
        for field in ("api_keys", "admin_keys"):  # HTTP headers carry no others
            valid = all(re.fullmatch("[!-~]+", key) for key in getattr(self, field))
            require(valid, field, "...", "printable ASCII without spaces, not empty")
        require((self.tls_cert is None) == (self.tls_key is None), "tls_key", self.tls_key, "given together with tls_cert")
        for field in ("request_timeout", "drain_timeout"):
            value = getattr(self, field)
            require(0 < value < math.inf, field, value, "above 0 seconds, finite")
        for field, least in (("max_body_bytes", 1024), ("max_header_bytes", 1024), ("max_connections", 1), ("max_choices", 1)):
            require(getattr(self, field) >= least, field, getattr(self, field), f"{least} or more")
