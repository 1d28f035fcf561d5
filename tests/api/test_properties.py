"""Whatever the tokens, their grouping, the stop strings and the characters: a stream says what the whole answer says."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

TOKEN = st.one_of(st.integers(0, 263), st.sampled_from(list("é日本🙂ab".encode())))  # any but <|im_end|>
IDS = st.lists(TOKEN, max_size=24)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
STOPS = st.lists(st.text(alphabet="abHelo wrld!é日\ufffd", min_size=1, max_size=4), max_size=4)


@settings(max_examples=150, deadline=None)
@given(ids=IDS, group=st.integers(1, 6), stop=STOPS, min_tokens=st.integers(0, 3), include=st.booleans(), special=st.booleans(),
       ends=st.booleans(), chat=st.booleans())  # fmt: skip
def test_a_stream_says_what_the_whole_answer_says(_server, ids, group, stop, min_tokens, include, special, ends, chat):
    _server.reset()
    script = [*ids, _server.IM_END] if ends or not ids else ids
    _server.fake.script = lambda request: script
    fields = {"stop": stop, "min_tokens": min_tokens, "include_stop_str_in_output": include, "skip_special_tokens": special,
              "max_tokens": max(len(script), min_tokens), "return_token_ids": True}  # fmt: skip
    path = "/v1/chat/completions" if chat else "/v1/completions"
    fields |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True} if chat else {"prompt": "hi", "logprobs": 0}
    status, _, raw = _server.raw("POST", path, fields)
    assert status == 200, raw
    [whole] = json.loads(raw)["choices"]
    _server.fake.group = group
    own = [chunk["choices"][0] for chunk in _server.stream(path, **fields)[:-1]]
    said = whole["message"]["content"] if chat else whole["text"]
    assert "".join((one["delta"].get("content") or "") if chat else one["text"] for one in own) == said
    last = own[-1]
    assert (last["finish_reason"], last["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])
    assert all(one["finish_reason"] is None for one in own[:-1])
    key = "content" if chat else "tokens"
    entries = [entry for one in own if one["logprobs"] for entry in one["logprobs"][key]]
    assert entries == whole["logprobs"][key]
    streamed = sum((one.get("token_ids", []) for one in own), [])
    if last["stop_reason"] is None or not isinstance(last["stop_reason"], str):
        assert streamed == whole["token_ids"] == script[: len(streamed)]
    else:  # tokens of the group that held the stop string were made, too
        assert streamed[: len(whole["token_ids"])] == whole["token_ids"]
    if not stop and special:
        kept = [i for i in script if i not in (_server.IM_START, _server.IM_END)]
        assert said == b"".join(_server.app.state.service.tokenizer.token_bytes(i) for i in kept).decode("utf-8", "replace")


@settings(max_examples=60, deadline=None)
@given(text=TEXT, path=st.sampled_from(["responses", "messages"]))
def test_other_apis_say_the_same_text(_server, text, path):
    _server.reset()
    _server.fake.script = lambda request: [*text.encode(), _server.IM_END]
    if path == "responses":
        body = {"input": text, "max_output_tokens": 200}
    else:
        body = {"model": "acme/tiny", "max_tokens": 200, "messages": [{"role": "user", "content": text}]}
    whole = json.loads(_server.raw("POST", f"/v1/{path}", body)[2])
    said = whole["output"][0]["content"][0]["text"] if path == "responses" else whole["content"][0]["text"]
    assert said == text
    raw = _server.raw("POST", f"/v1/{path}", {**body, "stream": True})[2].decode()
    events = [json.loads(block.split("data: ", 1)[1]) for block in raw.split("\n\n")[:-1]]
    if path == "responses":
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    else:
        deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == text
