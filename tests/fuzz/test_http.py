"""Requests within and outside of the OpenAPI document: no 5xx, no crash, every answer as documented."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.conftest import EXAMPLES, TIMEOUT

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.mark.usefixtures("undisturbed")
def test_every_operation(running):
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"}
    asked = [  # other operations have no input to get wrong
        (operation, mode)
        for operation in operations
        for mode in GenerationMode
        if operation.method != "get" or "{" in operation.path or mode is GenerationMode.POSITIVE
    ]
    for operation, mode in asked:

        @settings(
            max_examples=-(-EXAMPLES // sum(operation.method != "get" or "{" in operation.path for operation, _ in asked)),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            COUNT["inputs"] += 1
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT)

        check()
    print(COUNT)


COUNT = {"inputs": 0}
