"""`serve`: run the HTTP and gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.serving.cli import options
from chameleon_jax.serving.cli.model_check import check_model
from chameleon_jax.serving.cli.options import console, errors, fields_of, named_adapters, progress
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.tools.styles import STYLES

if TYPE_CHECKING:
    from chameleon_jax.serving.server import Server
    from chameleon_jax.serving.service.service import Service

logger = logging.getLogger(__name__)

DEFAULTS, ENGINE = ServerConfig(), EngineConfig()
API_KEY, ADMIN_KEY = "CHAMELEON_API_KEY", "CHAMELEON_ADMIN_KEY"
"""Environment variables that hold keys, separated by spaces."""


def serve(
    model: options.Model,
    lora_modules: options.LoraModules = None,
    adapter_dir: Annotated[
        list[str] | None,
        Option(help="Directory of adapters. Those directly inside are loaded at the start; clients may load any below it."),
    ] = None,
    hub_adapter: Annotated[list[str] | None, Option(help="Hub id from which clients may load an adapter.")] = None,
    adapter_url: Annotated[
        list[str] | None,
        Option(help="URL of adapters that clients may load, as s3://bucket/adapters. Repeat for several."),
    ] = None,
    load_on_request: Annotated[
        bool, Option(help="Load an adapter of the directories, hub ids or URLs when a request names it.")
    ] = DEFAULTS.load_on_request,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = DEFAULTS.host,
    port: Annotated[int, Option(help="HTTP port; 0 picks a free one.")] = DEFAULTS.port,
    grpc_port: Annotated[int, Option(help="gRPC port; 0 picks a free one, -1 serves no gRPC.")] = DEFAULTS.grpc_port or -1,
    served_model_name: Annotated[
        list[str] | None,
        Option(help="Name of the base model in requests (default: from MODEL). Repeat for several; answers have the first."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        Option(envvar=API_KEY, help="Key for all requests. Repeat for several; separate those in the variable by spaces."),
    ] = None,
    admin_key: Annotated[
        list[str] | None, Option(envvar=ADMIN_KEY, help="Key for loading and unloading adapters. Repeat for several.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        Option(
            help="Origin whose pages may read answers in a browser, as https://app.example; * allows any. Repeat for several."
        ),
    ] = None,
    allowed_methods: Annotated[list[str], Option(help="Method that such pages may use; * allows all.")] = ["*"],  # noqa: B006
    allowed_headers: Annotated[list[str], Option(help="Header that such pages may send; * allows all.")] = ["*"],  # noqa: B006
    allow_credentials: Annotated[
        bool, Option("--allow-credentials", help="Let such pages send cookies and HTTP authentication.")
    ] = DEFAULTS.allow_credentials,
    tls_cert: Annotated[str | None, Option(help="PEM file of the TLS certificate, for both protocols.")] = None,
    tls_key: Annotated[str | None, Option(help="PEM file of the certificate's key, not encrypted.")] = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, Option(help="Prompt tokens of one prefill step; longer prompts take several.")
    ] = ENGINE.max_num_batched_tokens,
    max_queue_len: Annotated[int, Option(help="Requests that may wait; further ones are refused with 429.")] = 1000,
    max_lora_rank: Annotated[int, Option(help=f"Largest rank of an adapter, 1 to {MAX_RANK}.")] = ENGINE.max_lora_rank,
    lora_host_bytes: Annotated[
        int, Option(help="Bytes of host memory for adapters; the rest wait on disk.")
    ] = ENGINE.lora_host_bytes,
    enable_lora: Annotated[
        bool, Option(help="Serve adapters. Without, they are refused and nothing is compiled for them.")
    ] = True,
    enable_lora_extras: Annotated[
        bool,
        Option(help="Serve adapters with LoRA on embed_tokens or lm_head, DoRA or biases too. Compiles more programs."),
    ] = ENGINE.enable_lora_extras,
    compile_programs: Annotated[
        str,
        Option(
            help="When programs are compiled. ahead: before the first request. background: a few large ones before, the others "
            "while these serve. lazy: when a step first needs one, and all requests wait. auto: background on CPU, else ahead."
        ),
    ] = ENGINE.compile_programs,
    dtype: options.Dtype = ENGINE.dtype,
    load_format: options.LoadFormat = ENGINE.load_format,
    generation_config: options.GenerationConfig = ENGINE.generation_config,
    gpu_memory_utilization: Annotated[
        float, Option(help="Share of the device's memory for weights, pool and scratch.")
    ] = ENGINE.gpu_memory_utilization,
    num_pages: Annotated[
        int | None, Option(help="Pages in the device pool (default: whatever memory is left; on CPU, enough for max_num_seqs).")
    ] = None,
    page_tokens: Annotated[int, Option(help="Least tokens in a page.")] = ENGINE.page_tokens,
    system: options.SystemName = options.DEFAULT_SYSTEM,
    ttft_slo: Annotated[float, Option(help="Target time to the first token, in seconds.")] = ENGINE.ttft_slo,
    tbt_slo: Annotated[float, Option(help="Target time between tokens, in seconds.")] = ENGINE.tbt_slo,
    predicted_output_len: Annotated[
        int, Option(help="Output tokens expected of a request until some have finished.")
    ] = ENGINE.predicted_output_len,
    seed: Annotated[int, Option(help="Seed from which requests without a seed draw theirs.")] = ENGINE.seed,
    length_proxy: Annotated[str | None, Option(help="Directory of a length predictor written by train-length-proxy.")] = None,
    request_timeout: Annotated[float, Option(help="Most seconds a request may take.")] = DEFAULTS.request_timeout,
    drain_timeout: Annotated[
        float, Option(help="Seconds that running requests get to finish at shutdown.")
    ] = DEFAULTS.drain_timeout,
    max_choices: Annotated[int, Option(help="Most choices of one request: its prompts times n.")] = DEFAULTS.max_choices,
    tool_call_parser: Annotated[
        str | None,
        Option(
            help=f"Style in which the model writes tool calls: {', '.join(STYLES)} (default: guessed from its chat template)."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, Option(help="Chat template of all conversations: a file, or its text (default: the model's).")
    ] = None,
    trust_request_chat_template: Annotated[
        bool, Option(help="Let clients send a chat template with a request. Templates run without a time limit.")
    ] = DEFAULTS.trust_request_chat_template,
    max_body_bytes: Annotated[int, Option(help="Most bytes of a request's body.")] = DEFAULTS.max_body_bytes,
    max_header_bytes: Annotated[int, Option(help="Most bytes of the head of an HTTP request.")] = DEFAULTS.max_header_bytes,
    max_connections: Annotated[int, Option(help="HTTP connections served at once.")] = DEFAULTS.max_connections,
    max_metric_adapters: Annotated[
        int, Option(help='Adapters with metrics of their own; further ones are counted as "other".')
    ] = DEFAULTS.max_metric_adapters,
    vllm_metrics: Annotated[bool, Option(help="Publish metrics under vLLM's names too, for its dashboards.")] = True,
    log_format: Annotated[str, Option(help="Format of the log: text or json.")] = "text",
    otlp_traces_endpoint: Annotated[str | None, Option(help="OpenTelemetry collector for traces, as http://host:4317.")] = None,
) -> None:
    """Serve a model and its adapters over HTTP and gRPC.

    HTTP has OpenAI's API, and is described at /docs.

    Example: chameleon-jax serve smollm2-135m --adapter-dir benchmarks/demo_adapters
    """
    flags = locals()
    engine_settings, server_settings = fields_of(EngineConfig, flags), fields_of(ServerConfig, flags)
    server_settings["grpc_port"] = None if grpc_port < 0 else grpc_port
    server_settings |= {"adapter_dirs": tuple(adapter_dir or ()), "hub_adapters": tuple(hub_adapter or ())}
    server_settings["adapter_urls"] = tuple(adapter_url or ())
    server_settings["served_model_name"] = tuple(served_model_name or ())
    with _compilations_left(), errors():
        for field in ("allowed_origins", "allowed_methods", "allowed_headers"):
            server_settings[field] = _listed(field, flags[field])
        server_settings |= {"api_keys": _keys(api_key, API_KEY), "admin_keys": _keys(admin_key, ADMIN_KEY)}
        config, adapters = ServerConfig(**server_settings), named_adapters(lora_modules)
        for name in adapters:
            require(name not in config.served_model_name, "lora_modules", name, "names that the base model does not have")
        _serve(model, config, engine_settings, adapters, log_format, otlp_traces_endpoint)


def _keys(given: list[str] | None, variable: str) -> tuple[str, ...]:
    """Keys given as flags or in `variable`. Raises ValueError for an empty variable, which must not open the server to all."""
    if not given and variable in os.environ:
        raise ValueError(f"{variable} is {os.environ[variable]!r}; allowed: keys separated by spaces, or leave it unset")
    return tuple(given or ())


def _listed(field: str, given: list[str] | None) -> tuple[str, ...]:
    """Values of a flag that is repeated for each, or is given them as one JSON list, as for vLLM. Raises ValueError."""
    values: list[object] = []
    for text in given or ():
        try:
            found = json.loads(text) if text.startswith("[") else [text]
        except ValueError:
            found = [None]
        values += found
    require(all(isinstance(value, str) for value in values), field, given, 'texts, or a JSON list of texts: ["*"]')
    return tuple(map(str, values))


def _serve(
    model: str,
    config: ServerConfig,
    settings: dict[str, Any],
    adapters: dict[str, str],
    log_format: str,
    otlp_traces_endpoint: str | None,
) -> None:
    from chameleon_jax.serving.service.adapter_sources import AdapterSources, check_readable

    begin = time.perf_counter()
    EngineConfig.of(settings)  # mistakes in settings and paths are found before JAX is imported, which takes seconds
    check_model(model, settings["load_format"])
    check_readable(adapters)
    sources = AdapterSources(config.adapter_dirs, config.hub_adapters, config.adapter_urls)

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
        logger.info("ready, in %.1f s", time.perf_counter() - begin)
        running = asyncio.create_task(server.run())  # signals are handled before the user is told how to send one
        await _greet(service, server)
        await running

    with contextlib.ExitStack() as at_end:
        exporter = None if otlp_traces_endpoint is None else otlp_exporter(otlp_traces_endpoint)
        listener = at_end.enter_context(contextlib.closing(listen(config)))
        at_end.enter_context(contextlib.closing(setup_logging(log_format)))
        logging.getLogger("jax").setLevel(logging.WARNING)
        metrics = at_end.enter_context(contextlib.closing(Metrics(config.max_metric_adapters, config.vllm_metrics)))
        llm = at_end.enter_context(contextlib.closing(AsyncLLM(model, progress=progress, **settings)))
        made = metrics.compilations
        logger.info("%d compilations so far, of which %d were found in the cache", made.at_start, made.cache_hits)
        made.serve()
        service = Service(llm, config, sources)
        if exporter is not None:
            tracer = at_end.enter_context(contextlib.closing(RequestTracer(exporter, service.model_name, llm.engine.clock)))
            llm.observers.append(tracer)
        uvloop.run(run())


@contextlib.contextmanager
def _compilations_left() -> Iterator[None]:
    """End the process with the body, even while programs are compiled: nothing can interrupt that.

    An error that the body does not report is raised as ever, and the process ends after the programs at hand.
    """
    try:
        yield
    except typer.Exit as error:
        _end_if_compiling(error.exit_code)
        raise
    _end_if_compiling(0)


def _end_if_compiling(code: int) -> None:
    if "chameleon_jax.serving.async_llm" not in sys.modules:  # nothing was compiled, and JAX takes seconds to import
        return
    from chameleon_jax.models.runtime.compile_threads import is_compiling
    from chameleon_jax.models.runtime.jax_setup import close_compilation_cache

    if is_compiling():
        close_compilation_cache()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _greet(service: Service, server: Server) -> None:
    """Print the addresses, and commands to try."""
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
    console.print(f"  {url}/ shows the status page, {url}/docs the HTTP API; control-C stops it", soft_wrap=True)
