"""Serving over HTTP and gRPC from the command line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.serving.cli.options import (
    DEFAULT_GENERATION_CONFIG,
    DEFAULT_SYSTEM,
    GenerationConfig,
    LoraModules,
    Model,
    SystemName,
    console,
    errors,
    named_adapters,
    progress,
)
from chameleon_jax.serving.service.server_config import ServerConfig

if TYPE_CHECKING:
    from chameleon_jax.serving.server import Server
    from chameleon_jax.serving.service.service import Service

DEFAULTS, ENGINE = ServerConfig(), EngineConfig()
API_KEY, ADMIN_KEY = "CHAMELEON_API_KEY", "CHAMELEON_ADMIN_KEY"
"""Variables of the environment with keys, spaces between them."""


def serve(
    model: Model,
    lora_modules: LoraModules = None,
    adapter_dir: Annotated[
        list[str] | None,
        typer.Option(help="Directory of adapters: those in it are loaded, and clients may name those below it."),
    ] = None,
    hub_adapter: Annotated[list[str] | None, typer.Option(help="Hub id that clients may load an adapter from.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Of HTTP; 0: any.")] = DEFAULTS.port,
    grpc_port: Annotated[int, typer.Option(help="Of gRPC; 0: any; -1: no gRPC.")] = DEFAULTS.grpc_port or -1,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the base model.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar=API_KEY, help="Every request needs one of these. In the variable: spaces between them."),
    ] = None,
    admin_key: Annotated[
        list[str] | None, typer.Option(envvar=ADMIN_KEY, help="Loading and unloading adapters needs one of these.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM file, for both protocols.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Prompt tokens of one prefill step.")
    ] = ENGINE.max_num_batched_tokens,
    max_queue_len: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 1000,
    max_lora_rank: Annotated[int, typer.Option(help=f"Largest rank that is served, 1 to {MAX_RANK}.")] = ENGINE.max_lora_rank,
    lora_host_bytes: Annotated[int, typer.Option(help="Of adapters in host memory.")] = ENGINE.lora_host_bytes,
    enable_lora: Annotated[bool, typer.Option(help="Without, adapters are refused and nothing is compiled for them.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = ENGINE.dtype,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = ENGINE.load_format,
    generation_config: GenerationConfig = DEFAULT_GENERATION_CONFIG,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the device's memory.")
    ] = ENGINE.gpu_memory_utilization,
    num_pages: Annotated[int | None, typer.Option(help="Of the device pool.")] = None,
    page_tokens: Annotated[int, typer.Option(help="Tokens of a page, at least.")] = ENGINE.page_tokens,
    system: SystemName = DEFAULT_SYSTEM,
    ttft_slo: Annotated[float, typer.Option(help="Seconds to the first token that are aimed at.")] = ENGINE.ttft_slo,
    tbt_slo: Annotated[float, typer.Option(help="Seconds between tokens that are aimed at.")] = ENGINE.tbt_slo,
    predicted_output_len: Annotated[
        int, typer.Option(help="Output tokens that are expected before any request has ended.")
    ] = ENGINE.predicted_output_len,
    seed: Annotated[int, typer.Option(help="Requests without a seed draw theirs from it.")] = ENGINE.seed,
    length_proxy: Annotated[str | None, typer.Option(help="Directory that train-length-proxy wrote.")] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = DEFAULTS.request_timeout,
    drain_timeout: Annotated[float, typer.Option(help="Seconds running requests get at the end.")] = DEFAULTS.drain_timeout,
    max_choices: Annotated[int, typer.Option(help="Choices of one request: its prompts times n.")] = DEFAULTS.max_choices,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = DEFAULTS.max_body_bytes,
    max_header_bytes: Annotated[int, typer.Option(help="Of an HTTP request.")] = DEFAULTS.max_header_bytes,
    max_connections: Annotated[int, typer.Option(help="Of HTTP, at once.")] = DEFAULTS.max_connections,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Where OpenTelemetry traces go, as http://host:4317.")
    ] = None,
) -> None:
    """Serve a model and its adapters over HTTP (OpenAI's API) and gRPC.

    Example: chameleon-jax serve smollm2-135m --adapter-dir benchmarks/demo_adapters
    """
    settings: dict[str, Any] = {
        name: value for name, value in locals().items() if name in EngineConfig.__dataclass_fields__ and name != "model"
    }
    with errors():
        config = ServerConfig(
            host=host,
            port=port,
            grpc_port=None if grpc_port < 0 else grpc_port,
            served_model_name=served_model_name,
            api_keys=_keys(api_key, API_KEY),
            admin_keys=_keys(admin_key, ADMIN_KEY),
            adapter_dirs=tuple(adapter_dir or ()),
            hub_adapters=tuple(hub_adapter or ()),
            tls_cert=tls_cert,
            tls_key=tls_key,
            request_timeout=request_timeout,
            drain_timeout=drain_timeout,
            max_choices=max_choices,
            max_body_bytes=max_body_bytes,
            max_header_bytes=max_header_bytes,
            max_connections=max_connections,
        )
        _serve(model, config, settings, named_adapters(lora_modules), log_format, otlp_traces_endpoint)


def _keys(given: list[str] | None, variable: str) -> tuple[str, ...]:
    """Raises ValueError where the variable is there without a key: whoever set it did not mean a server that is open."""
    if not given and variable in os.environ:
        raise ValueError(f"{variable} is {os.environ[variable]!r}; allowed: keys with spaces between them, or not to set it")
    return tuple(given or ())


def _serve(
    model: str,
    config: ServerConfig,
    settings: dict[str, Any],
    adapters: dict[str, str],
    log_format: str,
    otlp_traces_endpoint: str | None,
) -> None:
    import uvloop

    from chameleon_jax.serving.async_llm import AsyncLLM
    from chameleon_jax.serving.server import Server, listen
    from chameleon_jax.serving.service.service import Service
    from chameleon_jax.serving.telemetry.logs import setup_logging
    from chameleon_jax.serving.telemetry.metrics import Metrics
    from chameleon_jax.serving.telemetry.tracing import RequestTracer, otlp_exporter

    async def run() -> None:
        await service.load_named(adapters)
        server = Server(service, listener, metrics)
        await server.start()
        await _greet(service, server)
        await server.run()

    with contextlib.ExitStack() as at_end:
        exporter = None if otlp_traces_endpoint is None else otlp_exporter(otlp_traces_endpoint)
        listener = at_end.enter_context(contextlib.closing(listen(config)))
        at_end.enter_context(contextlib.closing(setup_logging(log_format)))
        logging.getLogger("jax").setLevel(logging.WARNING)
        metrics = at_end.enter_context(contextlib.closing(Metrics()))
        llm = at_end.enter_context(contextlib.closing(AsyncLLM(model, progress=progress, **settings)))
        metrics.compilations.serve()
        service = Service(llm, config)
        if exporter is not None:
            tracer = at_end.enter_context(contextlib.closing(RequestTracer(exporter, service.model_name, llm.engine.clock)))
            llm.observers.append(tracer)
        uvloop.run(run())


async def _greet(service: Service, server: Server) -> None:
    """What to try."""
    names = await service.llm.list_loras()
    host = f"[{service.config.host}]" if ":" in service.config.host else service.config.host
    url = f"http{'s' if service.config.tls_cert else ''}://{host}:{server.port}"
    key = ' -H "Authorization: Bearer $KEY"' if service.config.api_keys else ""
    console.print(f"{service.model_name} and {len(names)} adapters are served at {url}: {', '.join(names)}")
    if server.grpc_port is not None:
        console.print(f"gRPC, with reflection and health: {host}:{server.grpc_port}")
    for name in (service.model_name, *names[:1]):
        body = shlex.quote(json.dumps({"model": name, "prompt": "The heart of man is", "max_tokens": 32}))
        console.print(f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}", soft_wrap=True)
    console.print(f"  {url}/ shows its state, {url}/docs the HTTP API; control-C stops it", soft_wrap=True)
