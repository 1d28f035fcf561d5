import asyncio

import pytest
from pydantic import BaseModel

pydantic_ai = pytest.importorskip("pydantic_ai")


@pytest.fixture
def model(served):
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel(served.model, provider=OpenAIProvider(base_url=served.base_url, api_key="none"))


def test_run(served, model):
    result = pydantic_ai.Agent(model, instructions="Be brief.").run_sync("hi", model_settings={"max_tokens": 40, "seed": 3})
    assert result.output == "Hello world!" and result.usage.output_tokens == 4
    assert served.params.seed == 3 and "Be brief." in served.prompt


def test_streamed(served, model):
    async def run():
        async with pydantic_ai.Agent(model).run_stream("hi") as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(run())
    assert len(pieces) > 1 and "".join(pieces) == "Hello world!"


def test_tools(served, model):
    agent = pydantic_ai.Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"Sun in {city}"

    served.says(served.CALL, "It is sunny.")
    assert agent.run_sync("hi").output == "It is sunny."
    assert served.params.grammar is not None  # it asks for strict arguments by itself
    assert "Sun in Paris" in served.prompt


class Person(BaseModel):
    name: str
    age: int


def test_native_output(served, model):
    served.says('{"name": "Ada", "age": 36}')
    agent = pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(Person))
    assert agent.run_sync("hi").output == Person(name="Ada", age=36) and served.params.grammar is not None


def test_typed_output(served, model):
    served.says('<tool_call>\n{"name": "final_result", "arguments": {"name": "Ada", "age": 36}}\n</tool_call>')
    assert pydantic_ai.Agent(model, output_type=Person).run_sync("hi").output == Person(name="Ada", age=36)
