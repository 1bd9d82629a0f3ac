"""Everything that the OpenAPI document allows, and much that it does not: no 5xx, no crash, every answer as documented."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.conftest import EXAMPLES, TIMEOUT

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="session")
def api(running):
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")
OPERATIONS = 12
"""About; the examples are shared out among them."""


@pytest.mark.usefixtures("undisturbed")
@schema.parametrize()
@settings(max_examples=-(-EXAMPLES // OPERATIONS), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_operation(case):
    case.call_and_validate(checks=CHECKS, timeout=TIMEOUT)
