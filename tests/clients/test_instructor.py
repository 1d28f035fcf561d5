import openai
import pytest
from pydantic import BaseModel

instructor = pytest.importorskip("instructor")

MESSAGES = [{"role": "user", "content": "Ada is 36."}]


class Person(BaseModel):
    name: str
    age: int


def client(served, mode):
    return instructor.from_openai(openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0), mode=mode)


def test_json_in_markdown(served):
    served.says('```json\n{"name": "Ada", "age": 36}\n```')
    ask = client(served, instructor.Mode.MD_JSON)
    person = ask.create(model=served.model, messages=MESSAGES, response_model=Person)
    assert (person.name, person.age) == ("Ada", 36)


def test_what_does_not_validate_is_asked_for_again(served):
    served.says('```json\n{"name": "Ada", "age": "old"}\n```', '```json\n{"name": "Ada", "age": 36}\n```')
    ask = client(served, instructor.Mode.MD_JSON)
    person = ask.create(model=served.model, messages=MESSAGES, response_model=Person, max_retries=2)
    assert person.age == 36 and "age" in served.prompt and len(served.server.fake.requests) == 2


def test_tools(served):
    served.says('<tool_call>\n{"name": "Person", "arguments": {"name": "Ada", "age": 36}}\n</tool_call>')
    person = client(served, instructor.Mode.TOOLS).create(model=served.model, messages=MESSAGES, response_model=Person)
    assert (person.name, person.age) == ("Ada", 36) and "Person" in served.params.grammar.text  # a call that must be made


@pytest.mark.parametrize("mode", ["JSON", "JSON_SCHEMA"])
def test_constrained(served, mode):
    served.says('{"name": "Ada", "age": 36}')
    person = client(served, instructor.Mode[mode]).create(model=served.model, messages=MESSAGES, response_model=Person)
    assert (person.name, person.age) == ("Ada", 36) and served.params.grammar is not None
