"""The main job, end to end: Ray Serve, HAProxy, the real SmolLM2, the official openai client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time

import openai
import pytest

from benchmarks.disconnect import Watch
from tests.deployments.raw import speaks_our_words

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

MODEL = "SmolLM2-135M-Instruct"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ESSAY = [{"role": "user", "content": "Write a long essay about the sea."}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_the_model_is_the_fallback_and_says_so(server, client):
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    assert model.model_extra["meta"]["source"] == "fallback"
    assert "SERVING THE FALLBACK" in server.log.read_text()
    assert server.get("/health")[0] == 200
    assert json.loads(server.get("/version")[1])["version"]


def test_haproxy_speaks_our_words_under_serve_run(server):
    speaks_our_words(server)


def test_chat_streamed_and_whole_are_the_same_coherent_text(client):
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert whole.choices[0].message.content == text
    assert chunks[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt's pages
    assert len([chunk for chunk in chunks if chunk.choices]) > 5, "the answer came in one piece"
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason and not any(finishes[:-1])


def test_the_original_example_body(client):
    body = {"prompt": "The sky is", "max_tokens": 5, "temperature": 0}
    whole = client.post("/chat/completions", body=body, cast_to=object)
    assert whole["usage"]["completion_tokens"] == 5 and whole["choices"][0]["message"]["content"]
    streamed = client.completions.create(**body, model=MODEL, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed).strip()


def test_stop_seed_and_several_choices(client):
    ask = dict(model=MODEL, messages=ESSAY, max_tokens=12, n=2, seed=7, temperature=1.0)
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert first.choices[0].message.content != first.choices[1].message.content
    whole = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=20)
    assert " 7" in whole.choices[0].text
    stopped = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=20, stop=[" 7"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole.choices[0].text.split(" 7")[0]


def test_calls_that_must_be_made_always_parse(client):
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask = dict(model=MODEL, messages=CAPITAL, tools=tools, tool_choice=named, temperature=0, max_tokens=100)
    (call,) = client.chat.completions.create(**ask).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments).keys() == {"city"}
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**ask, stream=True)]
    pieces = [one.function.arguments for delta in deltas for one in delta.tool_calls or []]
    assert "".join(pieces) == call.function.arguments and len(pieces) > 3


def test_a_bad_request_is_a_400_that_names_the_field(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=9)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])


def test_32_streams_at_once(server):
    async def one(client: openai.AsyncOpenAI, index: int) -> tuple[int, str]:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Tell me about the number {index}."}], temperature=0,
            max_tokens=8 + index % 5, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text, tokens = "", 0
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return tokens, text

    async def everyone() -> list[tuple[int, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200) as client:
            return await asyncio.gather(*(one(client, index) for index in range(32)))

    answers = asyncio.run(everyone())
    assert [tokens for tokens, _ in answers] == [8 + index % 5 for index in range(32)]
    assert all(text.strip() for _, text in answers)


def test_pages_are_free_soon_after_clients_leave(server, client):
    """The bar is 50 ms on a quiet machine (benchmarks/disconnect.py measures it); a loaded one gets a second here."""
    watch = Watch(server)
    try:
        streams = [
            client.chat.completions.create(model=MODEL, messages=ESSAY, max_tokens=2000, stream=True,
                                           extra_body={"ignore_eos": True}) for _ in range(4)
        ]  # fmt: skip
        for stream in streams:
            next(iter(stream))
        _, _, used, running, _ = watch.now()
        assert used > 0 and running == 4
        for stream in streams:
            stream.close()
        left = time.time()
        assert watch.until_free()[1] - left < 1.0
    finally:
        watch.close()


def test_a_killed_replica_reaches_its_clients_and_comes_back(server, client):
    stream = client.chat.completions.create(
        model=MODEL, messages=ESSAY, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    events = iter(stream)
    for _ in range(3):
        next(events)
    victim = server.model_pid()
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(openai.APIError) as error:
        for _ in events:
            pass
    assert error.value.code == "replica_lost"
    server.wait_until(lambda: server.model_pid() != victim, 90)
    server.wait_ready(90)
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=16)
    assert "Paris" in answer.choices[0].message.content


def test_metrics_count_what_was_served(server):
    """What the engine counts is read once a second, and began again at 0 with the new replica."""

    def counted(name: str) -> bool:
        values = re.findall(rf"^{name}(?:\{{.*\}})? ([0-9.e+]+)$", server.get("/metrics")[1], re.MULTILINE)
        return sum(map(float, values)) > 0

    for name in ("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count", "vllm:request_success_total"):
        server.wait_until(lambda name=name: counted(name), 10)


def test_ctrl_c_stops_everything(server):
    """Last in this file: it ends the server."""
    began = time.monotonic()
    server.stop()
    assert server.process.returncode == 0 and time.monotonic() - began < 30
    server.wait_until(lambda: not server.daemons(), 15)
