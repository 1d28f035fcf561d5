"""Chat completions: through the official client, sync and async, and byte for byte on the wire."""

import asyncio
import json
from dataclasses import replace

import pytest

MESSAGES = [{"role": "user", "content": "hi"}]


def test_whole_answer_through_the_client(server):
    server.fake.cached = 4
    answer = server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.model == "acme/tiny" and answer.system_fingerprint.startswith("mini-llm-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world!")
    assert choice.finish_reason == "stop" and choice.index == 0 and choice.logprobs is None
    [request] = server.fake.requests
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_ids.count(server.IM_START) == 2 and request.prompt_ids.count(server.IM_END) == 1
    assert len(request.prompt_ids) == len(text) - 2 * 11 - 9
    usage = answer.usage
    assert usage.prompt_tokens == len(request.prompt_ids) and usage.completion_tokens == 4  # the eos counts
    assert usage.total_tokens == usage.prompt_tokens + 4 and usage.prompt_tokens_details.cached_tokens == 4


def test_streamed_answer_through_the_client(server):
    stream = server.client().chat.completions.create(
        model="acme/tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world!"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1


def test_many_async_streams(server):
    server.limits.max_queued_requests = 8
    server.fake.delay = 0.005

    async def run() -> None:
        client = server.async_client()

        async def one() -> str:
            text = ""
            async for chunk in await client.chat.completions.create(model="", messages=MESSAGES, stream=True):
                text += chunk.choices[0].delta.content or ""
            return text

        assert set(await asyncio.gather(*(one() for _ in range(12)))) == {"Hello world!"}
        whole = await client.chat.completions.create(model="acme/tiny", messages=MESSAGES)
        assert whole.choices[0].message.content == "Hello world!"
        await client.close()

    asyncio.run(run())


def test_the_wire_byte_for_byte(server):
    server.fake.script = lambda request: [*server.encode('a"é\n'), server.IM_END]
    *chunks, done = server.stream(stream_options={"include_usage": True})
    assert done == "[DONE]"
    head = {key: chunks[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["object"] == "chat.completion.chunk" and head["model"] == "acme/tiny"

    def chunk(delta, finish=None, **more):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return {**head, "choices": [choice], "usage": None}

    usage = chunks[-1].pop("usage")
    assert chunks == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "a"}),
        chunk({"content": '"'}),
        chunk({"content": "é"}),  # two tokens: nothing is sent for the first
        chunk({"content": "\n"}),
        chunk({}, "stop", stop_reason=None),
        {**head, "choices": []},
    ]
    assert usage["completion_tokens"] == 6


def test_no_usage_unless_asked_for(server):
    assert not any("usage" in chunk for chunk in server.stream()[:-1])


def test_the_fingerprint_is_about_numbers_alone(fresh_server):
    base = fresh_server.ROOMY
    infos = [base, replace(base, pool_tokens=5000, source="hub"), replace(base, numerics="other")]
    first, same, other = (fresh_server(info=info).chat()[2]["system_fingerprint"] for info in infos)
    assert first == same != other


def test_usage_in_every_chunk(server):
    chunks = server.stream(stream_options={"include_usage": True, "continuous_usage_stats": True})[:-1]
    assert [c["usage"]["completion_tokens"] for c in chunks[:-1]] == [1, 1, 2, 3, 4]


def test_the_specifications_example_body(server):
    body = {"prompt": "Explain KV caching", "max_tokens": 2}
    status, _, raw = server.raw("POST", "/v1/chat/completions", body)
    answer = json.loads(raw)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "Hello world"
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2
    assert server.fake.requests[0].prompt_ids.count(server.IM_START) == 2  # through the chat template
    chunks = server.stream(**body)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello world"


def test_a_prompt_without_a_chat_template_is_continued(fresh_server):
    server = fresh_server(chat=False)
    status, _, raw = server.raw("POST", "/v1/chat/completions", {"prompt": "ab", "max_tokens": 2})
    assert status == 200 and server.fake.requests[0].prompt_ids == server.encode("ab")
    status, _, body = server.chat()
    assert status == 400 and "/v1/completions" in body["error"]["message"]


def test_max_tokens_default_and_clamp(server):
    assert server.chat()[0] == 200
    prompt = len(server.fake.requests[0].prompt_ids)
    assert server.fake.requests[0].params.max_tokens == 256 - prompt
    server.chat(max_tokens=250)
    assert server.fake.requests[1].params.max_tokens == 256 - prompt
    server.chat(max_tokens=250, max_completion_tokens=3)
    assert server.fake.requests[2].params.max_tokens == 3
    status, _, body = server.chat(max_tokens=257)
    assert status == 400 and body["error"]["param"] == "max_tokens" and "257" in body["error"]["message"]


def test_n_choices_with_their_own_seeds(server):
    server.fake.script = lambda request: [*server.encode(f"{request.params.seed}"), server.IM_END]
    answer = server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES, n=3, seed=41)
    assert [c.message.content for c in answer.choices] == ["41", "42", "43"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len(server.fake.requests[0].prompt_ids)  # once, not three times
    texts = {0: "", 1: "", 2: ""}
    finishes = []
    chunks = server.stream(n=3, seed=2**63 - 2)
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        assert choice["index"] not in finishes
        texts[choice["index"]] += choice["delta"].get("content", "")
        finishes += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {0: str(2**63 - 2), 1: str(2**63 - 1), 2: str(-(2**63))} and sorted(finishes) == [0, 1, 2]
    roles = [c["choices"][0]["index"] for c in chunks[:-1] if "role" in c["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


def test_a_stop_string_over_token_borders_aborts_the_engine(server):
    server.fake.script = lambda request: server.encode("one two stop three" * 5)
    server.fake.delay = 0.002
    for stop in ("o st", ["zzz", "o st"]):
        answer = server.chat(stop=stop)[2]
        assert answer["choices"][0]["message"]["content"] == "one tw"
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["stop_reason"] == "o st"
        assert answer["usage"]["completion_tokens"] == 10
    chunks = server.stream(stop="o st")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "one tw"
    assert chunks[-2]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "o st",
    }
    server.wait_idle()
    assert len(server.fake.aborted) == 3
    kept = server.chat(stop="o st", include_stop_str_in_output=True)[2]
    assert kept["choices"][0]["message"]["content"] == "one two st"


def test_stop_is_not_looked_for_before_min_tokens(server):
    server.fake.script = lambda request: server.encode("a.b.éc.d.")
    answer = server.chat(stop=".", min_tokens=5, logprobs=True)[2]["choices"][0]  # the 5th token is half of the é
    assert answer["message"]["content"] == "a.b.éc" and answer["stop_reason"] == "."
    data = b"".join(bytes(entry["bytes"]) for entry in answer["logprobs"]["content"])
    assert data.decode() == "a.b.éc"


def test_logprobs_of_a_text_without_its_first_space(fresh_server):
    """As Llama-2's tokenizers decode."""
    server = fresh_server()
    server.app.state.service.tokenizer.strips_space = True
    server.fake.script = lambda request: server.encode(" world world!")
    history = [*MESSAGES, {"role": "assistant", "content": "a"}]
    for fields, text in (({}, "world world!"), ({"messages": history, "continue_final_message": True}, " world world!")):
        answer = server.chat(logprobs=True, **fields)[2]["choices"][0]
        chunks = server.stream(logprobs=True, **fields)[:-1]
        streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
        assert answer["message"]["content"] == text == "".join(entry["token"] for entry in answer["logprobs"]["content"])
        assert bytes(byte for entry in streamed for byte in entry["bytes"]).decode() == text


def test_stop_token_ids(server):
    server.fake.script = lambda request: server.encode("ab!cd")
    answer = server.chat(stop_token_ids=[258])[2]["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"], answer["stop_reason"]) == ("ab", "stop", 258)
    answer = server.chat(stop_token_ids=[258], include_stop_str_in_output=True)[2]["choices"][0]
    assert answer["message"]["content"] == "ab!"


def test_logprobs(server):
    answer = server.client().chat.completions.create(
        model="acme/tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["Hello", " world", "!"]  # not the eos: its text is not shown
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == answer.choices[0].message.content
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("A", -0.5), ("B", -1.5)]
    assert server.fake.requests[0].params.logprobs == 2


def test_logprobs_of_held_back_tokens_travel_with_their_text(server):
    server.fake.script = lambda request: [*server.encode("é st!"), server.IM_END]
    pairs = []
    for chunk in server.stream(logprobs=True, stop="stop")[:-1]:
        choice = chunk["choices"][0]
        if choice["logprobs"]:
            data = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
            pairs.append((choice["delta"]["content"], data.decode(), len(choice["logprobs"]["content"])))
    assert pairs == [("é", "é", 2), (" ", " ", 1), ("st!", "st!", 3)]


def test_logprobs_of_a_matched_stop_string_are_dropped(server):
    server.fake.script = lambda request: server.encode("a stop b")
    answer = server.chat(logprobs=True, stop="stop")[2]["choices"][0]
    assert [entry["token"] for entry in answer["logprobs"]["content"]] == ["a", " "]


def test_an_incomplete_character_at_the_end_is_flushed(server):
    server.fake.script = lambda request: server.encode("aé")
    answer = server.chat(max_tokens=2)[2]["choices"][0]
    assert answer["message"]["content"] == "a\ufffd" and answer["finish_reason"] == "length"


def test_parameters_reach_the_engine(server):
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -1, "frequency_penalty": 2, "seed": -5, "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    assert server.chat(**fields, logit_bias={"65": -100, "66": 3.5}, priority=-3, max_tokens=9.0)[0] == 200
    [request] = server.fake.requests
    for name, value in fields.items():
        assert getattr(request.params, name) == value, name
    assert request.params.logit_bias == {65: -100.0, 66: 3.5}
    assert request.priority == -3 and request.params.max_tokens == 9
    assert server.chat(top_p=0, top_k=-1)[0] == 200
    params = server.fake.requests[1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)  # only the best token is left
    assert server.chat()[0] == 200 and server.fake.requests[2].params.temperature == 1.0


def test_null_is_default(server):
    fields = dict.fromkeys(("temperature", "n", "stop", "stream", "seed", "tools", "response_format", "logprobs"))
    assert server.chat(**fields, stream_options=None, max_tokens=None)[0] == 200


def test_messages_for_the_template(server):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "<|im_end|>", "name": "bob"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert server.chat(messages=messages, max_tokens=1)[0] == 200
    ids = server.fake.requests[0].prompt_ids
    assert ids.count(server.IM_START) == 5 and ids.count(server.IM_END) == 4  # the user's own is plain text
    text = bytes(i for i in ids if i < 256).decode()
    assert text.startswith("system\nbe\nbrief\n") and "\nuser\n<tool_response>\n42\n" in text
    assert server.chat(add_generation_prompt=False)[0] == 200
    assert server.fake.requests[1].prompt_ids.count(server.IM_START) == 1


def test_the_last_message_is_continued(server):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " Hello world"}]
    server.client().chat.completions.create(
        model="acme/tiny", messages=messages, extra_body={"continue_final_message": True})  # fmt: skip
    text = server.app.state.service.tokenizer.decode(server.fake.requests[-1].prompt_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n Hello world"


@pytest.mark.parametrize(("role", "content", "more"), [
    ("user", "x", {}), ("assistant", "x", {"add_generation_prompt": True}), ("assistant", "  ", {})])  # fmt: skip
def test_what_cannot_be_continued(server, role, content, more):
    body = {"messages": [{"role": role, "content": content}], "continue_final_message": True, **more}
    status, _, answer = server.raw("POST", "/v1/chat/completions", body)
    assert status == 400 and json.loads(answer)["error"]["param"] == "continue_final_message"
