"""`chameleon.v1` with plain stubs: texts, status codes, deadlines, cancellation, health and reflection."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from chameleon_jax import LoRARequest, SamplingParams
from chameleon_jax.errors import DuplicateRequest, EngineDead, QueueFull, RequestFailed
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.rpc.calls import PROMPT, Code, asked, refused
from tests.serving.running import TIMEOUT, running


def settled(llm) -> None:
    async def main():
        while (stats := await llm.stats(max_age=0)).running or stats.waiting:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


@pytest.mark.parametrize("lora", ["", "gqa", "a0", "a3"])
def test_unary_and_stream_match_offline_output(inference, shared_llm, lora):
    async def main():
        request = LoRARequest(lora) if lora.startswith("a") else None
        params = SamplingParams(temperature=0, max_tokens=16, logprobs=1)
        return [output async for output in shared_llm.generate(PROMPT, params, request)][-1].outputs[0]

    expected = asyncio.run(main())
    whole = inference.Generate(asked(16, lora, logprobs=1), timeout=TIMEOUT)
    parts = list(inference.GenerateStream(asked(16, lora, logprobs=1), timeout=TIMEOUT))
    assert whole.text == "".join(part.text for part in parts) == expected.text
    assert list(whole.token_ids) == [t for part in parts for t in part.token_ids] == expected.token_ids
    assert whole.finish_reason == parts[-1].finish_reason == messages.FINISH_REASON_LENGTH
    assert {part.finish_reason for part in parts[:-1]} == {messages.FINISH_REASON_UNSPECIFIED}
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 16) and parts[-1].usage == whole.usage
    assert 0 <= whole.timing.queue <= whole.timing.first_token <= whole.timing.total
    for logprobs in (whole.logprobs, [position for part in parts for position in part.logprobs]):
        chosen = [position.alternatives[0] for position in logprobs]
        assert [alternative.token_id for alternative in chosen] == expected.token_ids
        values = [position[t].logprob for t, position in zip(expected.token_ids, expected.logprobs)]
        assert [alternative.logprob for alternative in chosen] == pytest.approx(values)


def test_token_ids_and_stops(inference, shared_llm):
    ids = messages.TokenIds(ids=shared_llm.tokenizer.encode(PROMPT))
    whole = inference.Generate(asked(16), timeout=TIMEOUT)
    request = asked(16)
    request.token_ids.CopyFrom(ids)
    assert inference.Generate(request, timeout=TIMEOUT).text == whole.text
    stop = whole.text[5:8]
    stopped = inference.Generate(asked(16, stop=[stop]), timeout=TIMEOUT)
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.stop_reason.text == stop
    token = whole.token_ids[4]
    stopped = inference.Generate(asked(16, stop_token_ids=[token]), timeout=TIMEOUT)
    assert stopped.finish_reason == messages.FINISH_REASON_STOP and stopped.stop_reason.token_id == token


def test_seeds(inference):
    texts = [inference.Generate(asked(16, temperature=1.0, seed=seed), timeout=TIMEOUT).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    ("request_", "code", "match"),
    [
        (messages.GenerateRequest(), Code.INVALID_ARGUMENT, "prompt is missing"),
        (messages.GenerateRequest(text=""), Code.INVALID_ARGUMENT, "prompt is empty"),
        (asked(presence_penalty=2.5), Code.INVALID_ARGUMENT, "presence_penalty is 2.5; allowed: -2 to 2"),
        (asked(repetition_penalty=0), Code.INVALID_ARGUMENT, "repetition_penalty is 0.0; allowed: above 0"),
        (asked(logit_bias={5: 101}), Code.INVALID_ARGUMENT, "logit_bias is {5: 101.0}; allowed: amounts of -100 to 100"),
        (asked(logit_bias={256: 1}), Code.INVALID_ARGUMENT, "logit_bias: token id 256 is out of range"),
        (asked(allowed_token_ids=[256]), Code.INVALID_ARGUMENT, "allowed_token_ids: token id 256 is out of range"),
        (asked(structured_outputs={}), Code.INVALID_ARGUMENT, "structured_outputs: nothing is set"),
        (messages.GenerateRequest(token_ids=messages.TokenIds()), Code.INVALID_ARGUMENT, "prompt is empty"),
        (messages.GenerateRequest(token_ids=messages.TokenIds(ids=[2**32 - 1])), Code.INVALID_ARGUMENT, "4294967295"),
        (asked(lora="nobody"), Code.NOT_FOUND, "nobody"),
        (asked(lora="\0" * 1000), Code.NOT_FOUND, "does not exist"),
        (asked(0), Code.INVALID_ARGUMENT, "max_tokens is 0"),
        (asked(2**32 - 1), Code.INVALID_ARGUMENT, "max_model_len"),
        (asked(temperature=float("nan")), Code.INVALID_ARGUMENT, "temperature is nan"),
        (asked(temperature=float("inf")), Code.INVALID_ARGUMENT, "temperature is inf"),
        (asked(top_p=-1.0), Code.INVALID_ARGUMENT, "top_p"),
        (asked(top_k=-5), Code.INVALID_ARGUMENT, "top_k"),
        (asked(min_p=2.0), Code.INVALID_ARGUMENT, "min_p"),
        (asked(logprobs=21), Code.INVALID_ARGUMENT, "logprobs"),
        (asked(min_tokens=9), Code.INVALID_ARGUMENT, "min_tokens"),
        (asked(stop=[""]), Code.INVALID_ARGUMENT, "stop"),
        (asked(stop_token_ids=range(50)), Code.INVALID_ARGUMENT, "stop_token_ids"),
        (asked(stop_token_ids=[256]), Code.INVALID_ARGUMENT, "256"),
        (asked(prompt="x" * 1_000_000), Code.INVALID_ARGUMENT, "characters"),
        (messages.GenerateRequest(text="x", request_id="a b"), Code.INVALID_ARGUMENT, "request_id"),
        (messages.GenerateRequest(text="x", request_id="x" * 200), Code.INVALID_ARGUMENT, "request_id"),
    ],
)
def test_wrong_requests(inference, method, request_, code, match):
    error = refused(getattr(inference, method), request_)
    assert error.code() is code and match in error.details()


@pytest.mark.parametrize("method", ["Inference/Generate", "Control/LoadLora", "Control/GetLoad"])
def test_undecodable_messages(channel, method):
    call = channel.unary_unary(f"/chameleon.v1.{method}")  # sends bytes as they are
    error = refused(call, b"\xff\xff\xff")
    assert error.code() is Code.INVALID_ARGUMENT and "cannot be parsed" in error.details()


def test_messages_that_are_too_large(inference, server):
    error = refused(inference.Generate, asked(prompt="x" * (server.service.config.max_body_bytes + 1)))
    assert error.code() is Code.RESOURCE_EXHAUSTED


def test_unknown_methods(channel):
    assert refused(channel.unary_unary("/chameleon.v1.Inference/Nothing"), b"").code() is Code.UNIMPLEMENTED


def test_control(control, inference, shared_llm):
    load = messages.LoadLoraRequest(lora_name="live", source_path="a1", pinned=True)
    assert not control.LoadLora(load, timeout=TIMEOUT).already_loaded
    assert control.LoadLora(load, timeout=TIMEOUT).already_loaded
    assert inference.Generate(asked(8, "live"), timeout=TIMEOUT).text == inference.Generate(asked(8, "a1")).text
    loras = {name: lora for lora in control.ListLoras(messages.ListLorasRequest()).loras for name in lora.lora_names}
    assert loras["live"] == loras["a1"] and loras["live"].pinned and loras["live"].tier == "resident"
    assert (loras["live"].rank, loras["live"].references) == (8, 0) and loras["live"].hits >= 2 and loras["live"].bytes > 0
    asyncio.run(shared_llm.pin_lora("a1", False))
    found = control.GetLoad(messages.GetLoadRequest())
    assert (found.running, found.waiting, found.kv_pages, found.draining) == (0, 0, 0, False)
    assert {"a1", "live"} <= set(found.resident_loras) and found.free_pages + found.adapter_pages == found.total_pages
    assert found.queues[0].name == "0" and not found.queues[0].HasField("quota_pages")
    control.UnloadLora(messages.UnloadLoraRequest(lora_name="live"))
    assert refused(control.UnloadLora, messages.UnloadLoraRequest(lora_name="live")).code() is Code.NOT_FOUND
    assert refused(inference.Generate, asked(8, "live")).code() is Code.NOT_FOUND
    info = control.GetModelInfo(messages.GetModelInfoRequest())
    assert (info.model_name, info.vocab_size, info.max_model_len, info.num_layers) == ("gqa", 256, 128, 2)
    for path in ("../a0", "/etc", "", "\0"):
        request = messages.LoadLoraRequest(lora_name="x", source_path=path)
        assert refused(control.LoadLora, request).code() is Code.INVALID_ARGUMENT
    for name in ("", "gqa", "a\nb", "x" * 1000):
        request = messages.LoadLoraRequest(lora_name=name, source_path="a0")
        assert refused(control.LoadLora, request).code() is Code.INVALID_ARGUMENT


def test_loading_keeps_a_pin_and_may_refuse_a_name_that_exists(control):
    def load(path: str, **fields) -> bool:
        control.LoadLora(messages.LoadLoraRequest(lora_name="policy", source_path=path, **fields), timeout=TIMEOUT)
        loras = control.ListLoras(messages.ListLorasRequest()).loras
        return next(lora.pinned for lora in loras if "policy" in lora.lora_names)

    assert not load("a0") and load("a0", pinned=True) and load("a1") and not load("a2", pinned=False)
    assert not load("a2", load_inplace=False)
    request = messages.LoadLoraRequest(lora_name="policy", source_path="a1", load_inplace=False)
    error = refused(control.LoadLora, request)
    assert error.code() is Code.INVALID_ARGUMENT and "lora_name is 'policy', which has other content" in error.details()
    control.UnloadLora(messages.UnloadLoraRequest(lora_name="policy"))


def test_abort(inference, control):
    request = asked(100)
    request.request_id = "mine"
    stream = inference.GenerateStream(request, timeout=TIMEOUT)
    assert next(stream).request_id == "mine"
    again = refused(inference.Generate, request)
    assert again.code() is Code.ALREADY_EXISTS and "mine" in again.details()
    assert control.Abort(messages.AbortRequest(request_id="mine")).aborted
    assert list(stream)[-1].finish_reason == messages.FINISH_REASON_ABORT
    assert not control.Abort(messages.AbortRequest(request_id="mine")).aborted


def test_cancelling_ends_the_request(inference, shared_llm):
    begun = asyncio.run(shared_llm.stats(max_age=0)).loop.generation_tokens
    stream = inference.GenerateStream(asked(100), timeout=TIMEOUT)
    next(stream)
    stream.cancel()
    call = inference.Generate.future(asked(100), timeout=TIMEOUT)
    while asyncio.run(shared_llm.stats(max_age=0)).running == 0 and not call.done():
        pass
    call.cancel()
    settled(shared_llm)
    assert asyncio.run(shared_llm.stats(max_age=0)).loop.generation_tokens < begun + 200
    assert shared_llm._streams == {}


def test_deadlines(inference, shared_llm, monkeypatch):
    collect = shared_llm.engine.loop.executor.collect
    monkeypatch.setattr(shared_llm.engine.loop.executor, "collect", lambda handle: (time.sleep(0.05), collect(handle))[1])
    for method in (inference.Generate, inference.GenerateStream):
        with pytest.raises(grpc.RpcError) as error:
            result = method(asked(100), timeout=0.3)
            list(result)
        assert error.value.code() is Code.DEADLINE_EXCEEDED
    settled(shared_llm)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (DuplicateRequest("x runs"), Code.ALREADY_EXISTS),
        (QueueFull("3 requests wait (max_queue_len)"), Code.RESOURCE_EXHAUSTED),
        (RequestFailed("its adapter could not be loaded"), Code.ABORTED),
        (EngineDead("the device is lost"), Code.UNAVAILABLE),
        (ZeroDivisionError("secret"), Code.INTERNAL),
    ],
)
def test_status_codes_of_engine_errors(inference, shared_llm, monkeypatch, raised, code):
    async def fails(*args, **kwargs):
        raise raised

    monkeypatch.setattr(shared_llm, "open_all", fails)
    for method in (inference.Generate, inference.GenerateStream):
        error = refused(method, asked())
        assert error.code() is code
        assert error.details() == ("internal error" if code is Code.INTERNAL else str(raised))
        retried = dict(error.trailing_metadata()).get("retry-after")
        assert (retried is not None) is (code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE))


def test_draining(inference, control, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm, "draining", True)
    assert refused(inference.Generate, asked()).code() is Code.UNAVAILABLE
    load = messages.LoadLoraRequest(lora_name="x", source_path="a0")
    assert refused(control.LoadLora, load).code() is Code.UNAVAILABLE
    assert control.GetLoad(messages.GetLoadRequest()).draining


def test_reflection_is_all_that_a_stub_needs(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"chameleon.v1.Inference", "chameleon.v1.Control", "grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName("chameleon.v1.Inference").methods_by_name["Generate"]
    request_class, response_class = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    call = channel.unary_unary(
        "/chameleon.v1.Inference/Generate",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    request = request_class(text=PROMPT)
    request.sampling.max_tokens = 3
    assert call(request, timeout=TIMEOUT).usage.completion_tokens == 3


def test_keys(shared_llm, adapter_dir):
    config = ServerConfig(
        port=0, grpc_port=0, api_keys=("user-key",), admin_keys=("admin-key",), adapter_dirs=(str(adapter_dir),)
    )
    with running(shared_llm, config) as server, grpc.insecure_channel(server.target) as channel:
        inference, control = stubs.InferenceStub(channel), stubs.ControlStub(channel)
        load = messages.LoadLoraRequest(lora_name="keyed", source_path="a0")

        def codes(key: str | None) -> list[grpc.StatusCode]:
            metadata = () if key is None else (("authorization", f"Bearer {key}"),)
            calls = [(inference.Generate, asked()), (control.ListLoras, messages.ListLorasRequest()), (control.LoadLora, load)]
            found = []
            for call, request in calls:
                try:
                    call(request, timeout=TIMEOUT, metadata=metadata)
                    found.append(Code.OK)
                except grpc.RpcError as error:
                    found.append(error.code())
            return found

        assert codes(None) == codes("wrong") == [Code.UNAUTHENTICATED] * 3
        assert codes("user-key") == [Code.OK, Code.OK, Code.PERMISSION_DENIED]
        assert codes("admin-key") == [Code.OK] * 3
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status == health_pb2.HealthCheckResponse.SERVING
        stubs.ControlStub(channel).UnloadLora(
            messages.UnloadLoraRequest(lora_name="keyed"), metadata=(("authorization", "Bearer admin-key"),)
        )
