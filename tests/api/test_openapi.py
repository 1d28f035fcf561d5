"""schemathesis over our own OpenAPI document: whatever it allows or forbids is answered as it says, and never with a 5xx.

More cases, also other ones each time: EXAMPLES=1000 pytest tests/api/test_openapi.py
"""

import copy
import os

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from deployments.api.contract import openapi

EXAMPLES = int(os.environ.get("EXAMPLES", 0))
TIMEOUT_S = 10
ENVELOPE = {"message", "type", "param", "code"}


def document():
    """Ours, with the name of the model that is served: any other is a 404, and most cases would end there."""
    found = copy.deepcopy(openapi("test"))
    for schema in found["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": ["acme/tiny", "", None]}
    for operations in found["paths"].values():
        for operation in operations.values():
            content = operation["responses"]["200"].get("content", {})
            if "text/event-stream" in content:  # a string, as 3.1 sees it; schemathesis holds each event against its schema
                content["text/event-stream"] = {}
    return found


def check_envelope(context, response, case):
    if response.status_code < 400:
        return
    assert response.status_code < 500, response.text
    body = response.json()
    if case.path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error", "request_id"} and body["error"].keys() == {"type", "message"}
        return
    assert body.keys() == {"error"} and body["error"].keys() == ENVELOPE
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        # what no schema says: vocabulary, context, fields that exclude each other. The field is named, and why
        assert body["error"]["param"] and body["error"]["code"] not in ("invalid_type", None), body


CHECKS = [content_type_conformance, status_code_conformance, response_schema_conformance, negative_data_rejection,
          unsupported_method, check_envelope]  # fmt: skip
config = SchemathesisConfig.from_dict({"generation": {"deterministic": not EXAMPLES}})
schema = schemathesis.openapi.from_dict(document(), config=config)


@schema.parametrize()
@settings(max_examples=EXAMPLES or 10, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation_answers_as_documented(case, server):
    server.limits.max_body_bytes = 1 << 20
    response = case.call(server.url, timeout=TIMEOUT_S)
    # of 5e-324 s a request may ask for, or bring too many messages, and be refused for that, whatever else is wrong with it
    case.validate_response(response, checks=[check_envelope] if response.status_code in (408, 413) else CHECKS)
