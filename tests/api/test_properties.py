"""Whatever the tokens, their grouping, the stop strings and the characters: a stream says what the whole answer says."""

import json
from codecs import utf_8_decode
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.conftest import IM_END

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
    raw = _server.raw("POST", f"/v1/{path}", {**body, "stream": True})[2].decode()
    events = [json.loads(block.split("data: ", 1)[1]) for block in raw.split("\n\n")[:-1]]
    if path == "responses":
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    else:
        deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == text
