"""Adapters that are loaded when a request first names them, over both protocols."""

from __future__ import annotations

import asyncio
import shutil
import threading
from types import SimpleNamespace

import fsspec
import httpx
import huggingface_hub
import pytest

from chameleon_jax.checkpoints import peft
from chameleon_jax.errors import DeadlineExceeded, Draining, RequestFailed
from chameleon_jax.sampling_params import LoRARequest
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.service import adapter_sources, load_on_request
from chameleon_jax.serving.service.server_config import ServerConfig
from tests import reference_models as reference
from tests.serving.async_calls import GREEDY, TIMEOUT, last
from tests.serving.conftest import CONFIG, make_service
from tests.serving.running import running


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


@pytest.fixture
def folder(tmp_path):
    """Adapters `late` and `team/deep`; `broken`, whose config is no JSON; `half`, without weights yet."""
    for i, name in enumerate(("late", "team/deep", "broken", "half")):
        reference.save_adapter(tmp_path / name, CONFIG, 4, seed=90 + i)
    (tmp_path / "broken" / peft.CONFIG_FILE).write_text("{")
    (tmp_path / "half" / peft.WEIGHTS_FILE).unlink()
    return tmp_path


@pytest.fixture
def service(shared_llm, folder):
    yield make_service(shared_llm, folder)
    for name in ("late", "team/deep"):
        if shared_llm.engine.adapters.get(name) is not None:
            run(shared_llm.remove_lora(name))


@pytest.fixture
def reads(shared_llm, monkeypatch):
    """Names of the adapters that were read."""
    found = []
    read = shared_llm.engine.packer.read
    monkeypatch.setattr(shared_llm.engine.packer, "read", lambda *args: (found.append(args[0]), read(*args))[1])
    return found


async def named(service, name, timeout=None):
    return await service.adapter_of(name, [], Deadline(timeout))


def test_requests_that_name_an_adapter_at_once_read_it_once(service, reads):
    async def main():
        assert await asyncio.gather(*(named(service, "late") for _ in range(8))) == [LoRARequest("late")] * 8
        assert await named(service, "late") == LoRARequest("late") and reads == ["late"]
        assert await named(service, "team/deep") == LoRARequest("team/deep")
        with pytest.raises(ValueError, match="model 'broken' cannot be served: .*not JSON"):
            await named(service, "broken")
        failed = await asyncio.gather(*(named(service, "broken") for _ in range(4)), return_exceptions=True)
        assert all(isinstance(error, ValueError) for error in failed) and reads.count("broken") == 2
        assert len(service._requested) == 0

    run(main())


@pytest.mark.parametrize(
    "mixed", [[("late", float("nan"))], [("late", 1.0), ("late", 1.0)], [("late", 1.0), ("gqa", 1.0)], [("late", 1.0)] * 9]
)
def test_a_wrong_mix_loads_nothing(service, reads, mixed):
    with pytest.raises(ValueError, match="allowed"):
        run(service.adapter_of(None, mixed, Deadline(None)))
    assert reads == []


@pytest.mark.parametrize(
    "name", ["missing", "half", "../late", "team/../late", "./late", "late/", "team//deep", "/etc", "a\nb", "x" * 300, "~"]
)
def test_other_names_are_no_models(service, reads, name):
    with pytest.raises(KeyError, match="does not exist"):
        run(named(service, name))
    assert reads == []


def test_absolute_paths_and_links_out_are_no_models(service, folder, tmp_path_factory):
    outside = reference.save_adapter(tmp_path_factory.mktemp("outside") / "secret", CONFIG, 2)
    (folder / "link").symlink_to(outside)
    for name in (str(folder / "late"), "link"):
        with pytest.raises(KeyError, match="does not exist"):
            run(named(service, name))


def test_an_adapter_that_was_completed_or_unloaded_is_loaded_by_its_next_request(service, folder):
    async def main():
        shutil.copytree(folder / "late", folder / "half", dirs_exist_ok=True)
        assert await named(service, "half") == LoRARequest("half")
        await service.unload_lora("half")
        assert await named(service, "half") == LoRARequest("half")
        await service.unload_lora("half")

    run(main())


def test_other_requests_go_on_while_one_waits_for_its_adapter(service, shared_llm, monkeypatch):
    gate, reading = threading.Event(), threading.Event()
    read = shared_llm.engine.packer.read

    def slow(*args):
        reading.set()
        assert gate.wait(TIMEOUT)
        return read(*args)

    monkeypatch.setattr(shared_llm.engine.packer, "read", slow)

    async def main():
        waiting = asyncio.create_task(named(service, "late"))
        while not reading.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(DeadlineExceeded):
            await named(service, "late", timeout=0.01)
        leaving = asyncio.create_task(named(service, "late"))
        await asyncio.sleep(0.001)
        leaving.cancel()
        assert (await last(shared_llm, "love is")).finished and not waiting.done()
        gate.set()
        assert await waiting == LoRARequest("late")  # the load has outlived the requests that left

    run(main())


def test_content_that_an_operator_gave_the_name_meanwhile_stays(service, shared_llm, monkeypatch, adapter_dir):
    find = service.sources.find

    def overtaken(name):
        path = find(name)
        asyncio.run(shared_llm.add_lora(name, adapter_dir / "a1"))
        return path

    monkeypatch.setattr(service.sources, "find", overtaken)

    async def main():
        await shared_llm.add_lora("expected", adapter_dir / "a1")
        assert await named(service, "late") == LoRARequest("late")
        assert shared_llm.engine.adapters.get("late") == shared_llm.engine.adapters.get("expected")
        await shared_llm.remove_lora("expected")

    run(main())


def test_nothing_is_loaded_while_the_server_drains_or_where_the_operator_forbids_it(shared_llm, folder, reads, monkeypatch):
    service = make_service(shared_llm, folder, load_on_request=False)
    with pytest.raises(KeyError, match="does not exist"):
        run(named(service, "late"))
    monkeypatch.setattr(shared_llm, "draining", True)
    with pytest.raises(Draining):
        run(named(make_service(shared_llm, folder), "late"))
    assert reads == []


def test_a_hub_id_that_is_allowed_is_a_model(shared_llm, folder, monkeypatch):
    downloads = []
    monkeypatch.setattr(adapter_sources, "download", lambda hub_id: (downloads.append(hub_id), folder / "late")[1])
    service = make_service(shared_llm, folder, hub_adapters=("org/bard",))

    async def main():
        assert await named(service, "org/bard") == LoRARequest("org/bard")
        with pytest.raises(KeyError, match="does not exist"):
            await named(service, "org/other")
        await service.unload_lora("org/bard")

    run(main())
    assert downloads == ["org/bard"]


def test_a_url_that_is_allowed_is_a_model(shared_llm, folder):
    memory = fsspec.filesystem("memory")
    for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        memory.pipe(f"/bucket/late/{file}", (folder / "late" / file).read_bytes())
    service = make_service(shared_llm, folder, adapter_urls=("memory://bucket",))
    url = "memory://bucket/late"

    async def main():
        assert await named(service, url) == LoRARequest(url)
        await service.load_lora("other", url)
        await service.load_lora("late", "late")
        assert await service.load_lora("late", url)  # the same content
        adapters = shared_llm.engine.adapters
        assert adapters.get(url) == adapters.get("other") == adapters.get("late") and adapters.path("other") == url
        with pytest.raises(KeyError, match="does not exist"):
            await named(service, "memory://other/late")
        for name in (url, "other", "late"):
            await service.unload_lora(name)

    run(main())
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def opened(monkeypatch):
    """Paths that were asked of the store in memory, which has an empty folder `bucket`; `fails` is raised in its place."""
    paths = SimpleNamespace(asked=[], fails=None)

    def open_it(store, path, *args, **kwargs):
        paths.asked.append(path)
        raise FileNotFoundError("secret of the store") if paths.fails is None else paths.fails

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", open_it)
    return paths


def test_a_name_that_no_store_has_costs_one_look_for_all_its_requests(shared_llm, folder, opened, monkeypatch):
    service, now = make_service(shared_llm, folder, adapter_urls=("memory://bucket",)), [0.0]
    monkeypatch.setattr(service._requested, "_clock", lambda: now[0])

    async def refused(name):
        with pytest.raises(KeyError, match=f"the model '{name}' does not exist; see the list of models") as error:
            await named(service, name)
        assert "secret" not in str(error.value)

    async def main():
        await asyncio.gather(*(refused("memory://bucket/none") for _ in range(8)))
        await refused("memory://bucket/none")
        assert len(opened.asked) == 1
        now[0] = load_on_request.MISSING_S
        await refused("memory://bucket/none")
        assert len(opened.asked) == 2

    run(main())


def test_names_that_no_store_has_are_remembered_up_to_a_number(shared_llm, folder, opened, monkeypatch):
    monkeypatch.setattr(load_on_request, "MAX_MISSING", 2)
    service = make_service(shared_llm, folder, adapter_urls=("memory://bucket",))

    async def main():
        for name, looks in (("a", 1), ("b", 2), ("c", 3), ("c", 3), ("b", 3), ("a", 4)):
            with pytest.raises(KeyError):
                await named(service, f"memory://bucket/{name}")
            assert len(opened.asked) == looks and len(service._requested._missing) <= 2

    run(main())


def test_a_store_that_fails_is_no_fault_of_the_request_and_its_words_stay_in_the_log(shared_llm, folder, opened, caplog):
    service = make_service(shared_llm, folder, adapter_urls=("memory://bucket",))
    opened.fails = ConnectionError("secret of the network")
    for looks in (1, 2):  # not remembered
        with pytest.raises(RequestFailed) as error:
            run(named(service, "memory://bucket/late"))
        assert str(error.value) == "model 'memory://bucket/late' cannot be loaded: its source cannot be read now"
        assert len(opened.asked) == looks
    assert "secret of the network" in caplog.text


def test_a_hub_that_fails_is_no_fault_of_the_request(shared_llm, folder, monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        raise OSError("secret of the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(RequestFailed, match="^model 'org/bard' cannot be loaded: its source cannot be read now$"):
        run(named(make_service(shared_llm, folder, hub_adapters=("org/bard",)), "org/bard"))


@pytest.mark.parametrize("first", ["with a path", "by name"])
def test_requests_that_give_the_path_and_requests_that_do_not_read_it_once(service, shared_llm, folder, reads, first):
    async def main():
        given = [last(shared_llm, "love is", GREEDY, LoRARequest("late", str(folder / "late"))) for _ in range(2)]
        by_name = [named(service, "late") for _ in range(2)]
        await asyncio.gather(*(given + by_name if first == "with a path" else by_name + given))
        assert reads == ["late"]

    run(main())


def test_both_protocols_load_and_mix(shared_llm, tmp_path):
    names = ("gqa", "alias")
    config = ServerConfig(adapter_dirs=(str(tmp_path),), served_model_name=names, port=0, grpc_port=0)
    with running(shared_llm, config) as server, Client(server.target, timeout=TIMEOUT) as client:
        http = httpx.Client(base_url=server.url, timeout=TIMEOUT)
        for i, name in enumerate(("late", "later")):  # after the start
            reference.save_adapter(tmp_path / name, CONFIG, 4, seed=90 + i)

        def complete(**fields):
            body = {"prompt": "love is", "max_tokens": 12, "temperature": 0} | fields
            return http.post("/v1/completions", json=body)

        def text(**fields):
            return complete(**fields).raise_for_status().json()["choices"][0]["text"]

        assert text(model="late") == client.generate("love is", GREEDY, lora_name="late").text[: len(text(model="late"))]
        mixed = [{"name": "late", "weight": 2.0}, {"name": "later", "weight": -0.5}]
        found = client.generate("love is", GREEDY, lora_name={"late": 2.0, "later": -0.5})
        parts = list(client.stream("love is", GREEDY, lora_name={"late": 2.0, "later": -0.5}))
        assert "".join(part.text for part in parts) == found.text
        assert found.text.startswith(text(lora=mixed)) and text(lora=mixed) == text(lora=mixed, model="gqa") == text(
            lora=mixed, model="alias"
        )
        assert text(lora=mixed) != text(model="late")
        assert text(lora=[{"name": "late"}]) == text(model="late")
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0, "lora": mixed}
        http.post("/v1/chat/completions", json=chat).raise_for_status()
        assert [model["id"] for model in http.get("/v1/models").json()["data"]][-2:] == ["late", "later"]

        def refused(**fields):
            response = complete(**fields)
            return response.status_code, response.json()["error"]["message"]

        for fields, status, message in [
            ({"lora": mixed, "model": "late"}, 400, "model is 'late'; allowed with lora: 'gqa' or 'alias', the base model"),
            ({"lora": [{"name": "gqa"}]}, 400, "lora has 'gqa'; allowed: adapters"),
            ({"lora": [{"name": "alias"}]}, 400, "lora has 'alias'; allowed: adapters"),
            ({"lora": [{"name": "nowhere"}]}, 404, "the model 'nowhere' does not exist"),
            ({"lora": [{"name": "late"}] * 2}, 400, "allowed: each name once"),
            ({"lora": []}, 400, "lora is []"),
            ({"lora": [{"name": "late"}] * 9}, 400, "at most 8 items"),
            ({"lora": [{"name": "late", "weight": "x"}]}, 400, "weight is 'x'"),
        ]:
            assert refused(**fields)[0] == status and message in refused(**fields)[1], fields
        body = b'{"prompt": "x", "lora": [{"name": "late", "weight": NaN}]}'
        assert http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code == 400
        with pytest.raises(ValueError, match="allowed: 1 to 8 adapters|weights is"):
            client.generate("love is", GREEDY, lora_name={"late": float("inf")})
        with pytest.raises(KeyError, match="nowhere"):
            client.generate("love is", GREEDY, lora_name="nowhere")
        for name in ("late", "later"):
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
        http.close()
