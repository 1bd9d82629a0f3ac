"""Plain stubs to a server without keys."""

from __future__ import annotations

import grpc
import pytest

from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def inference(channel):
    return stubs.InferenceStub(channel)


@pytest.fixture
def control(channel):
    return stubs.ControlStub(channel)
