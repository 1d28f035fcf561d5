"""Whatever the tokens, their grouping, the stop strings and the characters: a stream says what the whole answer says."""

import json
from codecs import utf_8_decode
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.conftest import IM_END, typed_events

TOKEN = st.one_of(st.integers(0, 263), st.sampled_from(list("é日本🙂ab".encode())))  # any but <|im_end|>
IDS = st.lists(TOKEN, max_size=20)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
SPAN = st.tuples(st.integers(0, 40), st.integers(1, 4))  # of a text: so that stop strings occur, overlap and begin each other
STOP = st.text(alphabet="abHelo wrld!é日\ufffd", min_size=1, max_size=3)


def first_stop(text, stops):
    """(end, stop) of the one whose last character comes first, the longest of those that end together."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return min(found)[::2] if found else None


@dataclass
class Asked:
    """The fields that change what is said of the tokens that the engine makes."""

    stop: list[str]
    stop_token_ids: list[int]
    min_tokens: int
    include: bool
    special: bool

    def said(self, tokenizer, ids):
        """(text, finish, stop_reason) of a choice whose sequence is `ids`: by its definition, in one piece."""
        ends = {IM_END, *self.stop_token_ids}
        made = next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
        at_end = bool(made) and made[-1] in ends
        shown = made[:-1] if at_end and not self.include else made

        table = tokenizer.byte_table(skip_special_tokens=self.special)
        text, reason = tokenizer.decode(shown, skip_special_tokens=self.special), None
        # a character that is not whole yet comes after min_tokens
        early = len(utf_8_decode(b"".join(table[i] for i in shown[: self.min_tokens]), "replace", False)[0])
        if len(shown) >= self.min_tokens and (found := first_stop(text[early:], self.stop)):
            end, stop = found
            return text[: early + end - (0 if self.include else len(stop))], "stop", stop
        if at_end:
            reason = None if made[-1] == IM_END else made[-1]
        return text, "stop" if at_end else "length", reason


@settings(max_examples=200, deadline=None)
@given(data=st.data(), scripts=st.lists(IDS, min_size=1, max_size=3), group=st.integers(1, 6), min_tokens=st.integers(0, 3),
       include=st.booleans(), special=st.booleans(), ends=st.booleans(), chat=st.booleans(), echo=st.booleans())  # fmt: skip
def test_a_stream_and_a_whole_answer_say_what_they_must(
    _server, data, scripts, group, min_tokens, include, special, ends, chat, echo
):
    _server.reset()
    tokenizer = _server.app.state.service.tokenizer
    scripts = [[*ids, IM_END] if ends or not ids else ids for ids in scripts]
    texts = [tokenizer.decode(ids, skip_special_tokens=special) for ids in scripts]
    spans = st.tuples(st.sampled_from(texts), SPAN).map(lambda pair: pair[0][pair[1][0] : sum(pair[1])] or "a")
    stop = data.draw(st.lists(STOP | spans, max_size=4), "stop")
    stop_ids = data.draw(st.lists(st.sampled_from(scripts[0]), max_size=1), "stop_token_ids")
    asked = Asked(stop, [i for i in stop_ids if i != IM_END], min_tokens, include, special)
    _server.fake.script = lambda request: scripts[int(request.request_id.rpartition("-")[2])]
    fields = {
        "n": len(scripts), "stop": stop, "stop_token_ids": asked.stop_token_ids, "min_tokens": min_tokens,
        "include_stop_str_in_output": include, "skip_special_tokens": special, "return_token_ids": True,
        "max_tokens": max(min_tokens, *map(len, scripts)),
    }  # fmt: skip
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if chat:
        fields |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    else:
        fields |= {"prompt": "hi", **({"echo": True} if echo else {"logprobs": 0})}
    status, _, raw = _server.raw("POST", path, fields)
    assert status == 200, raw
    wholes = json.loads(raw)["choices"]
    _server.fake.group = group
    chunks = [chunk["choices"][0] for chunk in _server.stream(path, **fields)[:-1]]
    assert [whole["index"] for whole in wholes] == list(range(len(scripts)))
    for whole, ids in zip(wholes, scripts, strict=True):
        own = [chunk for chunk in chunks if chunk["index"] == whole["index"]]
        said = whole["message"]["content"] if chat else whole["text"]
        text, finish, reason = asked.said(tokenizer, ids)
        assert (said, whole["finish_reason"], whole["stop_reason"]) == ("hi" * (echo and not chat) + text, finish, reason)
        check_stream(own, whole, said, chat, ids)


def check_stream(own, whole, said, chat, script):
    assert "".join((one["delta"].get("content") or "") if chat else one["text"] for one in own) == said
    last = own[-1]
    assert (last["finish_reason"], last["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])
    assert all(one["finish_reason"] is None for one in own[:-1])
    if whole["logprobs"]:
        key = "content" if chat else "tokens"
        entries = [entry for one in own if one["logprobs"] for entry in one["logprobs"][key]]
        assert entries == whole["logprobs"][key]
    streamed = sum((one.get("token_ids", []) for one in own), [])
    if last["stop_reason"] is None or not isinstance(last["stop_reason"], str):
        assert streamed == whole["token_ids"] == script[: len(streamed)]
    else:  # tokens of the group that held the stop string were made, too
        assert streamed[: len(whole["token_ids"])] == whole["token_ids"]


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
    events = typed_events(_server.raw("POST", f"/v1/{path}", {**body, "stream": True})[2])
    if path == "responses":
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    else:
        deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == text


ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "é"]), st.integers() | st.text(max_size=5) | st.none(), max_size=3)
CALL = ARGUMENTS.map(lambda found: f'<tool_call>\n{json.dumps({"name": "f", "arguments": found})}\n</tool_call>')
SAID = st.lists(st.text(alphabet="ab <{é🙂\n", max_size=6) | CALL, max_size=4).map("".join)
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TURN = {"role": "user", "content": "hi"}
BODIES = {
    "chat/completions": {"messages": [TURN], "tools": [{"type": "function", "function": FUNCTION}]},
    "responses": {"input": "hi", "tools": [{"type": "function", **FUNCTION}]},
    "messages": {"model": "acme/tiny", "messages": [TURN], "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
}


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from([*BODIES]), said=SAID, kept=st.integers(0, 200), group=st.integers(1, 30), one=st.booleans())
def test_texts_and_calls_of_a_stream_are_those_of_the_whole_answer(_roomy, path, said, kept, group, one):
    """kept: characters before the answer is cut off, in a call or anywhere; one: parallel calls are not allowed."""
    _roomy.reset()
    _roomy.fake.group = group
    made = _roomy.encode(said[:kept])
    _roomy.fake.script = lambda request: [*made, *([_roomy.IM_END] if kept >= len(said) else [])] or [_roomy.IM_END]
    body = {**BODIES[path], "max_output_tokens" if path == "responses" else "max_tokens": max(len(made), 1)}
    body |= {"tool_choice": {"type": "auto", "disable_parallel_tool_use": one}} if path == "messages" else {
        "parallel_tool_calls": not one}  # fmt: skip
    status, _, raw = _roomy.raw("POST", f"/v1/{path}", body)
    assert status == 200, raw
    streamed = _roomy.raw("POST", f"/v1/{path}", {**body, "stream": True})[2]
    events = _roomy.events(streamed)[:-1] if "chat" in path else typed_events(streamed)
    assert PUT_TOGETHER[path](events) == without_ids(json.loads(raw))


def without_ids(answer):
    """What an answer of one of the three APIs says."""
    if "choices" in answer:
        message = answer["choices"][0]["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        return message["content"] or "", calls, answer["choices"][0]["finish_reason"]
    if "output" in answer:
        items = [("".join(part["text"] for part in item["content"]) if item["type"] == "message" else
                  (item["name"], item["arguments"])) for item in answer["output"]]  # fmt: skip
        return items, answer["status"], answer["usage"]["output_tokens"]
    blocks = [block["text"] if block["type"] == "text" else (block["name"], block["input"]) for block in answer["content"]]
    return blocks, answer["stop_reason"]


def of_chat(events):
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", [])):
        name, arguments = calls.get(piece["index"], (None, ""))
        calls[piece["index"]] = (name or piece["function"]["name"], arguments + piece["function"].get("arguments", ""))
    text = "".join(delta.get("content") or "" for delta in deltas)
    return text, [calls[i] for i in range(len(calls))], events[-1]["choices"][0]["finish_reason"]


def of_responses(events):
    """Of the deltas, in the order of the items; they are those of the last event, too."""
    texts = {}
    for event in events:
        if event["type"] in ("response.output_text.delta", "response.function_call_arguments.delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = without_ids(events[-1]["response"])
    assert texts == {i: content for i, item in enumerate(last[0]) if (content := item if isinstance(item, str) else item[1])}
    return last


def of_messages(events):
    blocks = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = [event["content_block"], ""]
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            blocks[event["index"]][1] += delta["text"] if delta["type"] == "text_delta" else delta["partial_json"]
    said = [text if begun["type"] == "text" else (begun["name"], arguments(text)) for begun, text in blocks.values()]
    return said, next(event["delta"]["stop_reason"] for event in events if event["type"] == "message_delta")


def arguments(text):
    """Of a call that was cut off, the whole answer says that they are no JSON."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"INVALID_JSON": text}


PUT_TOGETHER = {"chat/completions": of_chat, "responses": of_responses, "messages": of_messages}
