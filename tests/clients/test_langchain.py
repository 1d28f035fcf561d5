import pytest
from pydantic import BaseModel

langchain = pytest.importorskip("langchain_openai")


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"Sun in {city}"


@pytest.fixture
def chat(served):
    return langchain.ChatOpenAI(model=served.model, base_url=served.base_url, api_key="none", max_retries=0, temperature=0.3,
                                max_tokens=200, stream_usage=True)  # fmt: skip


def test_invoke_and_stream(served, chat):
    answer = chat.invoke([("system", "Be brief."), ("human", "hi")])
    assert answer.content == "Hello world!" and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == 4 and served.params.temperature == 0.3 and served.params.max_tokens == 200
    chunks = list(chat.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == "Hello world!"
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 4


def test_batch_and_stop(served, chat):
    assert [answer.content for answer in chat.batch(["a", "b", "c"], stop=["wor"])] == ["Hello "] * 3


def test_tools(served, chat):
    bound = chat.bind_tools([get_weather])
    served.says(served.CALL)
    for answer in (bound.invoke("hi"), sum_of(bound.stream("hi"))):
        [call] = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}) and call["id"]
    served.says("It is sunny.")
    result = {"role": "tool", "tool_call_id": call["id"], "content": get_weather(**call["args"])}
    assert bound.invoke([("human", "hi"), answer, result]).content == "It is sunny."
    assert "Sun in Paris" in served.prompt


def sum_of(chunks):
    total = None
    for chunk in chunks:
        total = chunk if total is None else total + chunk
    return total


def test_the_responses_api(served):
    chat = langchain.ChatOpenAI(model=served.model, base_url=served.base_url, api_key="none", max_retries=0,
                                use_responses_api=True, store=False)  # fmt: skip
    assert chat.invoke("hi").text == "Hello world!"
    assert "".join(chunk.text for chunk in chat.stream("hi")) == "Hello world!"


def test_completions(served):
    text = langchain.OpenAI(model=served.model, base_url=served.base_url, api_key="none", max_retries=0)
    assert text.invoke("hi") == "Hello world!" == "".join(text.stream("hi"))


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_structured_output(served, chat, method):
    text = '{"name": "Ada", "age": 36}'
    served.says(f'<tool_call>\n{{"name": "Person", "arguments": {text}}}\n</tool_call>' if "function" in method else text)
    assert chat.with_structured_output(Person, method=method).invoke("Ada is 36.") == Person(name="Ada", age=36)
    assert served.params.grammar is not None
