"""The official client, with strict validation of answers, over every endpoint and the fields that change an answer's form."""

import asyncio

import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
ASK = {"model": "acme/tiny", "messages": MESSAGES}
SAMPLING = {
    "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 3, "logit_bias": {"65": 5},
    "stop": ["zzz", "yyy"], "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
    "extra_body": {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": False, "stop_token_ids": [1],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "priority": 1, "cache_salt": "s",
        "truncate_prompt_tokens": 50, "return_token_ids": True, "request_id": "r1", "timings": True, "prompt_logprobs": 2,
    },
}  # fmt: skip


@pytest.fixture
def client(server):
    return server.client(_strict_response_validation=True)


@pytest.mark.parametrize("fields", [
    {}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"max_tokens": 2}, {"max_completion_tokens": 2},
    {"stop": "wor"}, SAMPLING, {"reasoning_effort": "low", "tools": [], "tool_choice": "none", "n": 2, "logprobs": True},
    {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "low", "parallel_tool_calls": False},
], ids=lambda fields: "-".join(fields) if len(fields) < 5 else "all")  # fmt: skip
def test_chat(client, fields):
    whole = client.chat.completions.create(**ASK, **fields)
    stream = list(client.chat.completions.create(**ASK, **fields, stream=True, stream_options={"include_usage": True}))
    assert len(whole.choices) == fields.get("n", 1)
    for choice in whole.choices:
        own = [c.choices[0] for c in stream if c.choices and c.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason and own[0].delta.role == "assistant"
        entries = [entry for one in own if one.logprobs for entry in one.logprobs.content]
        assert entries == (choice.logprobs.content if choice.logprobs else [])
    [last] = [c for c in stream if not c.choices]
    assert last.usage == whole.usage and last is stream[-1]


@pytest.mark.parametrize("fields", [
    {}, {"n": 2, "best_of": 2}, {"logprobs": 0}, {"logprobs": 2}, {"max_tokens": 2}, {"echo": True}, {"stop": ["wor"]},
    {"suffix": ""}, {key: value for key, value in SAMPLING.items() if key not in ("metadata", "store", "service_tier")},
], ids=lambda fields: "-".join(fields) if len(fields) < 5 else "all")  # fmt: skip
@pytest.mark.parametrize("prompt", ["ab", ["ab", "c"], [97, 98], [[97], [98]]], ids=str)
def test_completions(server, client, prompt, fields):
    whole = client.completions.create(model="acme/tiny", prompt=prompt, **fields)
    # not strict: the client's type has no null finish_reason, which every chunk but the last has, OpenAI's too
    stream = list(server.client().completions.create(model="acme/tiny", prompt=prompt, **fields, stream=True))
    prompts = 2 if prompt in (["ab", "c"], [[97], [98]]) else 1
    assert [choice.index for choice in whole.choices] == list(range(prompts * fields.get("n", 1)))
    for choice in whole.choices:
        own = [c.choices[0] for c in stream if c.choices and c.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text and own[-1].finish_reason == choice.finish_reason
        tokens = [token for one in own if one.logprobs for token in one.logprobs.tokens]
        assert tokens == (choice.logprobs.tokens if choice.logprobs else [])


def test_models(client):
    [card] = client.models.list()
    assert client.models.retrieve("acme/tiny") == card


def test_responses(client):
    ask = {"model": "acme/tiny", "input": "hi", "temperature": 0.2, "top_p": 0.5, "max_output_tokens": 30}
    whole = client.responses.create(**ask)
    *_, last = client.responses.create(**ask, stream=True)
    assert last.type == "response.completed" and last.response.output_text == whole.output_text == "Hello world!"
    assert last.response.usage == whole.usage


def test_the_asynchronous_client_and_its_helpers(server):
    async def run():
        async with server.async_client() as client, client.chat.completions.stream(**ASK) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        return kinds, final

    kinds, final = asyncio.run(run())
    assert "content.delta" in kinds and final.choices[0].message.content == "Hello world!"


def test_raw_answers_carry_the_request_id(client):
    answer = client.chat.completions.with_raw_response.create(**ASK, extra_headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine" and answer.parse()._request_id == "mine"
