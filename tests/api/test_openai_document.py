"""Whatever request OpenAI's published document allows: a 2xx, or a 4xx that names the field it is about.

openai_requests.json is an extract of that document (MIT licence), made by openai_document.py. More cases, and other ones each
time: EXAMPLES=1000 pytest tests/api/test_openai_document.py
"""

import copy
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.modes import GenerationMode

from deployments.protocol.fields import BY_NAME

EXAMPLES = int(os.environ.get("EXAMPLES", 0))
TABLES = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/responses": "responses"}
FIXED = {"model": {"const": "acme/tiny"}, "prompt": {"type": "string", "minLength": 1}, "best_of": {"type": "null"}}
DOCUMENT = json.loads(Path(__file__).with_name("openai_requests.json").read_text())


def request_schema(document, path):
    content = document["paths"][path]["post"]["requestBody"]["content"]
    return content["application/json"]["schema"]["$ref"].rpartition("/")[2]


def objects(document, name):
    """The parts of a request's schema that have properties."""
    schema = document["components"]["schemas"][name]
    yield from [schema] if "properties" in schema else []
    for part in schema.get("allOf", []):
        if "$ref" in part:
            yield from objects(document, part["$ref"].rpartition("/")[2])
        elif "properties" in part:
            yield part


def cases(path, without=()):
    """A strategy of requests, all for the served model; without some fields more of the others are well-formed, too."""
    document = copy.deepcopy(DOCUMENT)
    for part in objects(document, request_schema(document, path)):
        for name in without:
            part["properties"].pop(name, None)
        for name, value in FIXED.items():
            if name in part["properties"] and (without or name == "model"):
                part["properties"][name] = value
    config = SchemathesisConfig.from_dict({"generation": {"deterministic": not EXAMPLES, "mode": "positive"}})
    operation = schemathesis.openapi.from_dict(document, config=config)[path]["POST"]
    return operation.as_strategy(generation_mode=GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", TABLES)
def test_every_field_is_known(path):
    names = {name for part in objects(DOCUMENT, request_schema(DOCUMENT, path)) for name in part["properties"]}
    assert names - BY_NAME[TABLES[path]].keys() == set()  # neither served nor refused nor said to be ignored


@pytest.mark.parametrize("path", TABLES)
@pytest.mark.parametrize("only_served", [False, True], ids=["all", "served"])
def test_what_openai_allows_is_answered_or_refused_by_name(server, path, only_served):
    refused = {name for name, field in BY_NAME[TABLES[path]].items() if field.status == "refused"} if only_served else ()
    statuses = Counter()
    server.limits.max_body_bytes = 1 << 20

    @settings(max_examples=EXAMPLES or 30, deadline=None, derandomize=not EXAMPLES, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate], database=None)  # fmt: skip
    @given(case=cases(path, refused))
    def check(case):
        response = case.call(server.url, timeout=10)
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["param"] and error["code"] and error["message"], error

    check()
    assert not only_served or statuses[200], statuses
    print(path, dict(statuses))
