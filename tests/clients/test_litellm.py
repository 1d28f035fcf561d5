import pytest
from pydantic import BaseModel

litellm = pytest.importorskip("litellm")

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def ask(request, served):
    """Its three ways to us."""
    base = served.url if request.param == "anthropic" else served.base_url

    def ask(**fields):
        fields.setdefault("messages", MESSAGES)
        model = f"{request.param}/{served.model}"
        return litellm.completion(model=model, api_base=base, api_key="none", num_retries=0, **fields)

    return ask


def test_chat_whole_and_streamed(ask):
    answer = ask(max_tokens=50, temperature=0.2)
    assert answer.choices[0].message.content == "Hello world!" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4
    chunks = list(ask(stream=True, max_tokens=50))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world!"
    assert ask(max_tokens=2).choices[0].finish_reason == "length"


def test_tools(served, ask):
    served.says(served.CALL)
    [call] = ask(tools=TOOLS).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("get_weather", '{"city":"Paris"}')
    rebuilt = litellm.stream_chunk_builder(list(ask(tools=TOOLS, stream=True)))
    [call] = rebuilt.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("get_weather", '{"city":"Paris"}')


def test_errors_have_its_types(served, ask):
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "word " * 9000}])
    with pytest.raises(litellm.BadRequestError, match="'temperature'"):
        ask(temperature=9)


def test_text_completion(served):
    answer = litellm.text_completion(model=f"text-completion-openai/{served.model}", prompt="hi", api_base=served.base_url,
                                     api_key="none")  # fmt: skip
    assert answer.choices[0].text == "Hello world!"


class Person(BaseModel):
    name: str
    age: int


def test_structured_output(served):
    served.says('{"name": "Ada", "age": 36}')
    for model in ("openai", "hosted_vllm"):
        answer = litellm.completion(model=f"{model}/{served.model}", messages=MESSAGES, response_format=Person,
                                    api_base=served.base_url, api_key="none")  # fmt: skip
        assert Person.model_validate_json(answer.choices[0].message.content).age == 36
        assert served.params.grammar is not None
