import pytest

anthropic = pytest.importorskip("anthropic")

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]


@pytest.fixture
def client(served):
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, _strict_response_validation=True)


def test_message_whole_and_streamed(served, client):
    ask = {"model": served.model, "max_tokens": 50, "messages": USER, "system": "Be brief.",
           "extra_body": {"temperature": 0.4}}  # fmt: skip
    whole = client.messages.create(**ask)
    assert whole.content[0].text == "Hello world!" and whole.stop_reason == "end_turn" and whole.usage.output_tokens == 4
    assert served.params.temperature == 0.4 and "Be brief." in served.prompt
    with client.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == "Hello world!"
        final = stream.get_final_message()
    assert final.content[0].text == "Hello world!" and final.usage.output_tokens == 4
    stopped = client.messages.create(**ask, stop_sequences=["wor"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "wor", "Hello ")


def test_tools(served, client):
    served.says(served.CALL)
    ask = {"model": served.model, "max_tokens": 200, "tools": TOOLS}
    whole = client.messages.create(**ask, messages=USER)
    with client.messages.stream(**ask, messages=USER) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        [use] = message.content
        assert (use.type, use.name, use.input) == ("tool_use", "get_weather", {"city": "Paris"})
        assert message.stop_reason == "tool_use"
    served.says("It is sunny.")
    result = {"type": "tool_result", "tool_use_id": whole.content[0].id, "content": "Sun in Paris"}
    turns = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**ask, messages=turns).content[0].text == "It is sunny."
    assert "Sun in Paris" in served.prompt


@pytest.mark.parametrize("streamed", [False, True])
def test_the_tool_runner(served, client, streamed):
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"Sun in {city}"

    served.says(served.CALL, "It is sunny.")
    ask = {"model": served.model, "max_tokens": 200, "messages": USER, "tools": [get_weather], "stream": streamed}
    answers = [part.get_final_message() if streamed else part for part in client.beta.messages.tool_runner(**ask)]
    assert [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert "user\nhi" in served.prompt and "Sun in Paris" in served.prompt


def test_counting_and_errors(served, client):
    count = client.messages.count_tokens(model=served.model, messages=USER)
    assert count.input_tokens == client.messages.create(model=served.model, max_tokens=5, messages=USER).usage.input_tokens
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(model=served.model, max_tokens=0, messages=USER)
    assert error.value.body["error"]["type"] == "invalid_request_error" and error.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="no", max_tokens=5, messages=USER)
