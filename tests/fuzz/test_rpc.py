"""Messages of every type, and bytes that are no message, to both services: every status is a documented one."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from tests.fuzz.conftest import EXAMPLES, TIMEOUT

ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHODS = [method for service in messages.DESCRIPTOR.services_by_name.values() for method in service.methods]
NAMES = st.sampled_from(["", "gqa", "a0", "a1", "canary-2", "../a0", "/etc/passwd", "a0/../a1", "live"])
TEXTS = st.one_of(NAMES, st.text(max_size=200), st.text(alphabet="\0\n\x7f\ufffd😀é", max_size=20))
INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def values(field: FieldDescriptor) -> st.SearchStrategy:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return message_of(field.message_type)
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return st.one_of(st.floats(), st.floats(0, 1), st.sampled_from([0.0, 1.0]))
    least, most = INTEGERS[field.type]
    return st.one_of(st.integers(max(least, 0), 300), st.integers(least, most))


@st.composite
def message_of(draw: st.DrawFn, descriptor) -> object:
    """Draw a message with some of its fields set, to mostly valid small values or to any."""
    message = getattr(messages, descriptor.name)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            getattr(message, field.name).update(draw(st.dictionaries(values(key), values(value), max_size=20)))
        elif repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field), max_size=20)))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bool, bytes]:
    method = draw(st.sampled_from(METHODS))
    data = draw(message_of(method.input_type)).SerializeToString()  # type: ignore[attr-defined]
    damage = draw(st.sampled_from(["none", "none", "none", "flip", "cut", "noise"]))
    if damage == "noise":
        data = draw(st.binary(max_size=300))
    elif data and damage == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif data and damage == "flip":
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    service = method.containing_service.full_name
    return f"/{service}/{method.name}", method.name.endswith("Stream"), data


@pytest.mark.usefixtures("undisturbed")
def test_every_method(running):
    count = 0
    with grpc.insecure_channel(running.target) as channel:

        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(call=calls())
        def check(call):
            nonlocal count
            count += 1
            path, streams, data = call
            try:
                if streams:
                    list(channel.unary_stream(path)(data, timeout=TIMEOUT))
                else:
                    channel.unary_unary(path)(data, timeout=TIMEOUT)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()
                assert code in ALLOWED, error.details()

        check()
    print(f"{count} messages")
