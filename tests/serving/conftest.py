"""One small engine behind one service, for all tests of the servers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from chameleon_jax import LLM
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from tests import reference_models as reference
from tests import text_models
from tests.engines import Engines
from tests.serving.async_calls import LONG, PROMPTS, run, settled
from tests.serving.running import TIMEOUT, Running, running

CONFIG = reference.CONFIGS["gqa"]
THREADS = {"step_timeout", "max_lora_loads", "max_lora_queue"}
"""Settings of AsyncLLM itself."""


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters a0 to a3, of ranks 2, 8, 16 and 40."""
    folder = tmp_path_factory.mktemp("adapter-dir")
    for i, rank in enumerate((2, 8, 16, 40)):
        reference.save_adapter(folder / f"a{i}", CONFIG, rank, seed=i)
    return folder


@pytest.fixture(scope="session")
def shared_llm(engines: Engines, text_model: Path) -> Iterator[AsyncLLM]:
    """Not to be closed, nor its adapters a0 to a3 removed: others use it too."""
    with engines.borrow(text_model) as engine, contextlib.closing(AsyncLLM(engine)) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm, adapter_dir):
    for i in range(4):
        run(shared_llm.add_lora(f"a{i}", adapter_dir / f"a{i}"))
    yield shared_llm
    run(settled(shared_llm))
    assert shared_llm._streams == {}


@pytest.fixture
def own_llm(engines: Engines, text_model: Path) -> Iterator[Callable[..., AsyncLLM]]:
    """Makes an AsyncLLM that a test may break, over an engine that it may not."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> AsyncLLM:
            own = {name: settings.pop(name) for name in THREADS & settings.keys()}
            engine = stack.enter_context(engines.borrow(text_model, **settings))
            if "step_timeout" in own:  # which includes the compilation of a step's programs
                LLM(engine).generate(PROMPTS[0], LONG)
            llm = AsyncLLM(engine, **own)

            def close() -> None:
                assert llm.close(), "the engine's thread hangs, so no other test may have the engine"

            stack.callback(close)
            return llm

        yield make


@pytest.fixture(scope="module")
def server(shared_llm: AsyncLLM, adapter_dir: Path) -> Iterator[Running]:
    """Both protocols, without keys."""
    with running(shared_llm, ServerConfig(adapter_dirs=(str(adapter_dir),), port=0, grpc_port=0)) as server:
        yield server


@pytest.fixture(scope="session")
def llama2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer in which a word's space is part of its first token."""
    return text_models.save_model(tmp_path_factory.mktemp("llama2-model") / "llama2", text_models.VARIANTS["llama2"])


@pytest.fixture(scope="session")
def served(engines: Engines, llama2_model: Path) -> Iterator[SimpleNamespace]:
    """Every way to ask one engine with that model: `llm`, `openai`, `rpc`, the gRPC `target`."""
    with (
        engines.borrow(llama2_model, num_pages=300) as engine,
        contextlib.closing(AsyncLLM(engine)) as llm,
        running(llm, ServerConfig(port=0, grpc_port=0)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client,
        Client(server.target) as rpc,
    ):
        yield SimpleNamespace(llm=llm, openai=client, rpc=rpc, target=server.target)


def make_service(llm: AsyncLLM, adapter_dir: Path, **settings: object) -> Service:
    """Called "gqa", with a0 to a3 of `adapter_dir` once `load_named({})` was awaited."""
    config = dataclasses.replace(ServerConfig(adapter_dirs=(str(adapter_dir),), port=0, grpc_port=0), **settings)  # type: ignore[arg-type]
    return Service(llm, config)
