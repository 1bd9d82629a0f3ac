"""Requests of the gRPC tests, and calls that are expected to fail."""

from __future__ import annotations

import grpc
import pytest

from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from tests.serving.running import TIMEOUT

PROMPT = "love is"
Code = grpc.StatusCode


def asked(tokens: int = 8, lora: str = "", prompt: str = PROMPT, **sampling) -> messages.GenerateRequest:
    params = messages.SamplingParams(**({"temperature": 0, "max_tokens": tokens} | sampling))
    return messages.GenerateRequest(text=prompt, lora_name=lora, sampling=params)


def refused(call, *args, **kwargs) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        result = call(*args, timeout=TIMEOUT, **kwargs)
        list(result) if hasattr(result, "__next__") else result
    return error.value
