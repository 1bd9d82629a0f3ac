"""Every example runs offline and prints the lines that its docstring promises; a tiny model stands in for theirs.

Engines are lent to the examples, with their settings. Only the server's process builds its own.
"""

import contextlib
import functools
import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chameleon_jax.config import EngineConfig
from chameleon_jax.models.config import PRESETS
from chameleon_jax.serving import async_llm, llm
from chameleon_jax.serving.engine import LLMEngine
from tests import reference_models as reference
from tests.engines import Engines

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(text_model: Path) -> str:
    return str(text_model)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("king-james", "shakespeare")):
        reference.save_adapter(folder / name, reference.CONFIGS["gqa"], rank=8, seed=seed)
    return folder


@pytest.fixture
def lent(engines: Engines, text_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines of the tests in the place of those that an example would build, and their model in the place of its own."""
    monkeypatch.setitem(PRESETS, "tiny", reference.CONFIGS["gqa"])
    with contextlib.ExitStack() as stack:

        def lend(model: str, settings: Mapping[str, Any], progress: Callable[[int, int], None]) -> tuple[LLMEngine, bool]:
            EngineConfig.of(settings)  # refuses what the example's own engine would refuse
            lazy = {name: value for name, value in settings.items() if name != "load_format"} | {"compile_programs": "lazy"}
            engine = stack.enter_context(engines.borrow(text_model, **lazy))
            monkeypatch.setattr(engine, "restart", functools.partial(engine.restart, **lazy))  # from which its sizes come
            return engine, False

        monkeypatch.setattr(llm, "open_engine", lend)
        monkeypatch.setattr(async_llm, "open_engine", lend)
        yield


@pytest.fixture
def run(lent: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example's `main`, with some constants changed, and return its output."""

    def run_main(name: str, *args: Any, **constants: Any) -> str:
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        main.__globals__.update(constants)
        main(*args)
        return capsys.readouterr().out

    return run_main


def test_offline(run: Callable[..., str], model: str, adapters: Path) -> None:
    lines = run("offline", model, adapters).splitlines()
    assert [line.split()[0] for line in lines] == ["base", "bard", "bible"]
    assert len({line.split("The heart of man is")[1] for line in lines}) == 3


def test_async_streaming(run: Callable[..., str], model: str, adapters: Path) -> None:
    output = run("async_streaming", model, adapters)
    assert output.count("base model") > 1
    assert output.count(" length\n") == 2
    assert "finished or aborted: True" in output


def test_openai_client(run: Callable[..., str], model: str, adapters: Path) -> None:
    sizes = "--max-num-seqs 32 --max-num-batched-tokens 64 --max-lora-rank 256 --num-pages 1200"  # programs of lent engines
    settings = runpy.run_path(str(EXAMPLES / "openai_client.py"))["SETTINGS"] + f" {sizes}"
    models, base, adapted = run("openai_client", model, adapters, SETTINGS=settings).splitlines()[:3]
    assert models.endswith("king-james, shakespeare")
    assert base.split(": ", 1)[1] != "''"
    assert adapted.startswith("king-james: ") and len(adapted) > len("king-james: ")


def test_hot_swapping(run: Callable[..., str]) -> None:
    output = run("hot_swapping")
    resident = re.findall(r"(\d+) of (\d+) resident: (.*)", output)
    assert [int(known) for _, known, _ in resident] == [16, 16, 16, 15]
    assert all(int(count) < int(known) for count, known, _ in resident)
    assert all("tenant-00" in names for _, _, names in resident)
    assert int(re.findall(r"evictions (\d+)", output)[-1]) > 0


def test_finetune_and_serve(run: Callable[..., str], model: str) -> None:
    output = run("finetune_and_serve", model)
    assert len(re.findall(r"step \d+/20  loss \d", output)) == 2
    without, adapted = (line.split(": ", 1)[1] for line in output.splitlines()[-2:])
    assert without != adapted


def test_train_and_serve(run: Callable[..., str], model: str) -> None:
    found = re.findall(r"step (\d+)/20  loss ([\d.]+) nats a token  (.*)", run("train_and_serve", model))
    assert [int(step) for step, _, _ in found] == [5, 10, 15, 20]
    assert len({text for _, _, text in found}) > 1  # the weights of later steps were served


def test_own_system(run: Callable[..., str]) -> None:
    output = run("own_system", REQUESTS=24)
    fifo, own = ([int(ms) for ms in re.findall(r"(\d+) ms", line)] for line in output.splitlines())
    assert len(fifo) == len(own) == 2
    assert own[0] < own[1]


def test_every_example_says_how_it_is_run_and_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in names}
    for name in names:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"Run: python examples/{name}.py" in source and "Prints " in source
