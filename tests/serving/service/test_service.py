"""Rules shared by both servers: keys, names, adapters that clients load, and damaged files."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil

import httpx
import ml_dtypes
import pytest
import safetensors.numpy

from chameleon_jax.checkpoints import peft
from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.errors import Draining, Forbidden, RequestFailed, Unauthenticated
from chameleon_jax.models.adapters import host_store, packing
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.service.server_config import ServerConfig
from tests import reference_models as reference
from tests.serving.conftest import CONFIG, make_service
from tests.serving.running import running

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def service(shared_llm, adapter_dir):
    service = make_service(shared_llm, adapter_dir)
    asyncio.run(service.load_named({}))
    return service


@pytest.mark.parametrize(
    ("keys", "given", "use", "load"),
    [
        (((), ()), None, None, None),
        (((), ()), "Bearer anything", None, None),
        ((("k",), ()), None, Unauthenticated, Unauthenticated),
        ((("k",), ()), "Bearer k", None, Forbidden),
        ((("k",), ()), "Basic k", Unauthenticated, Unauthenticated),
        ((("k",), ()), "Bearer ", Unauthenticated, Unauthenticated),
        ((("k",), ()), "Bearer kk", Unauthenticated, Unauthenticated),
        ((("k",), ()), "Bearer \xff", Unauthenticated, Unauthenticated),
        ((("k", "l"), ("a",)), "bearer l", None, Forbidden),
        ((("k",), ("a",)), "Bearer a", None, None),
        (((), ("a",)), None, None, Unauthenticated),
        (((), ("a",)), "Bearer a", None, None),
    ],
)
def test_keys(shared_llm, adapter_dir, keys, given, use, load):
    service = make_service(shared_llm, adapter_dir, api_keys=keys[0], admin_keys=keys[1])
    for admin, error in ((False, use), (True, load)):
        if error is None:
            service.check_access(given, admin)
        else:
            with pytest.raises(error):
                service.check_access(given, admin)


def test_names(service):
    assert service.model_name == "gqa"
    assert service.lora_named(None) is service.lora_named("") is service.lora_named("gqa") is None
    assert service.lora_named("a2") == LoRARequest("a2")
    for name in ("A2", "a2 ", "gqa/", "x" * 100_000):
        with pytest.raises(KeyError, match="does not exist"):
            service.lora_named(name)


def test_every_served_name_is_the_base_model_and_no_adapters(shared_llm, adapter_dir):
    service = make_service(shared_llm, adapter_dir, served_model_name=("first", "second"))
    assert service.model_name == "first"
    assert service.lora_named("first") is service.lora_named("second") is None
    with pytest.raises(KeyError, match="does not exist"):
        service.lora_named("gqa")
    for name in ("first", "second"):
        with pytest.raises(ValueError, match=f"lora_name is '{name}'; allowed: .* but no name of the base model"):
            asyncio.run(service.load_lora(name, "a0"))


def test_float8_adapters_are_served(shared_llm, tmp_path):
    reference.save_adapter(tmp_path / "wide", CONFIG, 8, seed=3)
    wide = safetensors.numpy.load_file(tmp_path / "wide" / peft.WEIGHTS_FILE)
    narrow = {name: tensor.astype(ml_dtypes.float8_e4m3fn) for name, tensor in wide.items()}
    shutil.copytree(tmp_path / "wide", tmp_path / "narrow")
    safetensors.numpy.save_file(narrow, tmp_path / "narrow" / peft.WEIGHTS_FILE)
    rounded = {name: tensor.astype("float32") for name, tensor in narrow.items()}
    safetensors.numpy.save_file(rounded, tmp_path / "wide" / peft.WEIGHTS_FILE)
    service = make_service(shared_llm, tmp_path)

    async def main():
        await service.load_named({})
        hashes = {shared_llm.engine.adapters.get(name).content_hash for name in ("wide", "narrow")}
        assert len(hashes) == 1
        for name in ("wide", "narrow"):
            await service.unload_lora(name)

    asyncio.run(main())


def test_adapter_directories_are_loaded_without_broken_adapters(shared_llm, tmp_path, caplog):
    for i in range(3):
        reference.save_adapter(tmp_path / f"d{i}", CONFIG, 2, seed=i)
    (tmp_path / "d1" / peft.CONFIG_FILE).write_text("{")
    reference.save_adapter(tmp_path / "gqa", CONFIG, 2)  # has the base model's name
    service = make_service(shared_llm, tmp_path)

    async def main():
        await service.load_named({})
        assert {"d0", "d2"} <= set(await shared_llm.list_loras()) and "d1" not in await shared_llm.list_loras()
        for name in ("d0", "d2"):
            await service.unload_lora(name)

    asyncio.run(main())
    assert "'d1'" in caplog.text and "'gqa'" in caplog.text


def test_a_dtype_that_is_not_served_is_the_clients_error_over_both_protocols(shared_llm, tmp_path):
    for name in ("good", "bad"):
        reference.save_adapter(tmp_path / name, CONFIG, 2)
    damage(tmp_path / "bad", "other dtype")
    with running(
        shared_llm, ServerConfig(adapter_dirs=(str(tmp_path),), port=0, grpc_port=0)
    ) as server:  # the server starts all the same
        response = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "bad"})
        assert response.status_code == 400 and "dtype F8_E8M0; allowed: F16" in response.json()["error"]["message"]
        with Client(server.target) as client, pytest.raises(ValueError, match="dtype F8_E8M0; allowed: F16"):
            client.load_lora("x", "bad")
        assert "good" in {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
        httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "good"}).raise_for_status()


@pytest.mark.parametrize("error", [MemoryError("none left"), TypeError("odd"), RuntimeError("device")])
def test_one_failing_adapter_leaves_the_others(shared_llm, tmp_path, caplog, monkeypatch, error):
    for i in range(3):
        reference.save_adapter(tmp_path / f"e{i}", CONFIG, 2, seed=i)
    service = make_service(shared_llm, tmp_path)
    pack = packing.pack
    packed = []

    def fail_second(*args):
        packed.append(args)
        if len(packed) == 2:
            raise error
        return pack(*args)

    monkeypatch.setattr(packing, "pack", fail_second)

    async def main():
        await service.load_named({})
        assert {"e0", "e2"} <= set(await shared_llm.list_loras()) and "e1" not in await shared_llm.list_loras()
        for name in ("e0", "e2"):
            await service.unload_lora(name)

    asyncio.run(main())
    assert "'e1'" in caplog.text and str(error) in caplog.text
    packed[:] = [()]
    with pytest.raises(RequestFailed, match=rf"'e1' cannot be loaded: {type(error).__name__}"):
        asyncio.run(service.load_lora("e1", "e1"))
    packed[:] = [()]
    with pytest.raises(ValueError, match=rf"adapter 'e1', .*{type(error).__name__}"):
        asyncio.run(service.load_named({"e1": str(tmp_path / "e1")}))


def test_named_adapters_must_exist(service):
    with pytest.raises(ValueError, match="nowhere"):
        asyncio.run(service.load_named({"x": "/nowhere"}))


@pytest.mark.parametrize("name", ["", "gqa", "a\nb", "a\0", "x" * 257])
def test_forbidden_adapter_names(service, name):
    with pytest.raises(ValueError, match="lora_name"):
        asyncio.run(service.load_lora(name, "a0"))


@pytest.mark.parametrize(
    ("template", "error"), [(None, "no chat_template"), ("{%", "cannot be compiled: here, line 1"), ("fine", None)]
)
def test_conversations_that_no_template_can_render(service, shared_llm, monkeypatch, template, error):
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate(template, {}, "here"))
    chat = service.chat_tokens([{"role": "user", "content": "x"}])
    if error is None:
        assert service.chat_error is None and asyncio.run(chat) == shared_llm.tokenizer.encode("fine")
    else:
        assert error in service.chat_error
        with pytest.raises(ValueError, match=f"messages: .*{error}"):
            asyncio.run(chat)


def test_variables_of_a_chat_template_may_have_any_name(service, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate("{{ func }}{{ messages[0].content }}", {}))
    tokens = asyncio.run(service.chat_tokens([{"content": "x"}], **{"self": 0, "func": 1, "messages": 2, "template": 3}))
    assert shared_llm.tokenizer.decode(tokens) == "1x"


def damage(folder, how: str) -> None:
    weights, config = folder / peft.WEIGHTS_FILE, folder / peft.CONFIG_FILE
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "corrupt header":
        weights.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    elif how == "header of many bytes":
        weights.write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    elif how == "too large":
        with weights.open("r+b") as file:
            file.truncate(1 << 40)  # sparse
    elif how == "huge rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**9}))
    elif how == "wrong rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4}))
    elif how == "wrong base":
        shutil.rmtree(folder)
        reference.save_adapter(folder, reference.CONFIGS["mha"], 8)
    elif how == "bomb":
        config.write_text("[" * 500_000)
    elif how == "large config":
        config.write_text(" " * (2 << 20) + "{}")
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled":
        weights.rename(folder / "adapter_model.bin")
    elif how == "other dtype":
        tensors = {name: t.astype(ml_dtypes.float8_e8m0fnu) for name, t in safetensors.numpy.load_file(weights).items()}
        safetensors.numpy.save_file(tensors, weights)
    elif how == "directory":
        weights.unlink()
        weights.mkdir()
    elif how == "not UTF-8":
        config.write_bytes(b"\xff\xfe{}")


DAMAGES = [
    "truncated",
    "empty",
    "corrupt header",
    "header of many bytes",
    "too large",
    "huge rank",
    "wrong rank",
    "wrong base",
    "bomb",
    "large config",
    "no weights",
    "pickled",
    "other dtype",
    "directory",
    "not UTF-8",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_name_keeps_its_content(shared_llm, tmp_path, how):
    reference.save_adapter(tmp_path / "good", CONFIG, 8, seed=5)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad", how)
    service = make_service(shared_llm, tmp_path)

    async def main():
        await service.load_lora("x", "good")
        before = [output async for output in shared_llm.generate("love", GREEDY, LoRARequest("x"))][-1]
        host_bytes = (await shared_llm.stats(max_age=0)).host_bytes
        with pytest.raises(ValueError) as error:
            await service.load_lora("x", "bad")
        assert len(str(error.value)) < 1000
        after = [output async for output in shared_llm.generate("love", GREEDY, LoRARequest("x"))][-1]
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert (await shared_llm.stats(max_age=0)).host_bytes == host_bytes
        await service.unload_lora("x")

    asyncio.run(main())


def test_a_rank_above_the_servers_is_refused_with_the_flag_that_allows_it(shared_llm, tmp_path):
    reference.save_adapter(tmp_path / "x", CONFIG, 300)
    with pytest.raises(ValueError, match=r"rank is 300; allowed: 1 to 256 \(max_lora_rank; the server's --max-lora-rank"):
        asyncio.run(make_service(shared_llm, tmp_path).load_lora("x", "x"))


def test_files_that_vanish_during_the_load(shared_llm, tmp_path, monkeypatch):
    reference.save_adapter(tmp_path / "x", CONFIG, 8)
    service = make_service(shared_llm, tmp_path)
    read_config = peft.read_config

    def vanish(directory):
        config = read_config(directory)
        shutil.rmtree(directory)
        return config

    monkeypatch.setattr(peft, "read_config", vanish)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        asyncio.run(service.load_lora("x", "x"))


def test_files_that_vanish_later_are_not_missed(shared_llm, tmp_path):
    reference.save_adapter(tmp_path / "x", CONFIG, 8)
    service = make_service(shared_llm, tmp_path)

    async def main():
        await service.load_lora("x", "x")
        shutil.rmtree(tmp_path / "x")
        assert [output async for output in shared_llm.generate("love", GREEDY, LoRARequest("x"))][-1].finished
        await service.unload_lora("x")

    asyncio.run(main())


def test_a_full_disk_keeps_adapters_in_memory(shared_llm, tmp_path, monkeypatch, caplog):
    reference.save_adapter(tmp_path / "x", CONFIG, 8)
    service = make_service(shared_llm, tmp_path)
    store = shared_llm.engine.store

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host_store.safetensors.numpy, "save_file", full)
    monkeypatch.setattr(store, "_limit", 0)

    async def main():
        await service.load_lora("x", "x")
        assert [output async for output in shared_llm.generate("love", GREEDY, LoRARequest("x"))][-1].finished
        await service.unload_lora("x")

    asyncio.run(main())
    store._disk.submit(lambda: None).result()
    assert "No space left" in caplog.text


def test_nothing_is_loaded_while_the_server_drains(service, monkeypatch):
    monkeypatch.setattr(service.llm, "draining", True)
    with pytest.raises(Draining):
        asyncio.run(service.load_lora("x", "a0"))
