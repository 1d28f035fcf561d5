"""Tools: prompts, and calls in every API's form, whole and streamed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.tools import mistral
from tests.api.conftest import typed_events
from tests.grammar.walks import accepts, compiled

WEATHER = {"name": "get_weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "f"}}]
FLAT = [{"type": "function", "parameters": None, "strict": False, **tool["function"]} for tool in TOOLS]
BLOCKS = [{"name": "get_weather", "input_schema": WEATHER["parameters"]}, {"name": "f", "input_schema": {"type": "object"}}]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f'Let me see.\n{PARIS}\n<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>'
OTHER = PARIS.replace("get_weather", "f").replace('"city": "Paris"', "")
USER = [{"role": "user", "content": "hi"}]
ASK = {"model": "acme/tiny", "messages": USER, "tools": TOOLS}
CHATML = (
    "{% for t in tools or [] %}[{{ t.function.name }} {{ t.function.parameters | tojson }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "({{ c.function.arguments.city }}){% endfor %}{% if m.tool_call_id %} of {{ m.name }}{% endif %}<|im_end|>{% endfor %}"
)


def says(server, text, group=1):
    server.fake.script = lambda request: [*server.encode(text), server.IM_END]
    server.fake.group = group


def prompt(server):
    return bytes(i for i in server.fake.requests[-1].prompt_ids if i < 256).decode()


def calls(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def gathered(chunks):
    """The choice of a stream as (content, calls by index, finish, ids)."""
    content, found, finish = None, {}, None
    for choice in (chunk.choices[0] for chunk in chunks if chunk.choices):
        assert finish is None
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for call in choice.delta.tool_calls or []:
            if call.index not in found:
                assert call.index == len(found) and call.type == "function" and call.function.arguments == ""
                found[call.index] = [call.id, call.function.name, ""]
            else:
                assert call.id is None and call.function.name is None and call.function.arguments
                found[call.index][2] += call.function.arguments
        finish = choice.finish_reason
    return content, list(found.values()), finish


@pytest.mark.parametrize(("text", "content", "found"), [
    (PARIS, None, [("get_weather", '{"city": "Paris"}')]),
    (TWO, "Let me see.", [("get_weather", '{"city": "Paris"}'), ("f", "{}")]),
    ("No <tool is needed.", "No <tool is needed.", []),
    (PARIS + "\nDone.", "\nDone.", [("get_weather", '{"city": "Paris"}')]),
])  # fmt: skip
def test_through_the_client(roomy, text, content, found):
    says(roomy, text)
    client = roomy.client(_strict_response_validation=True)
    [choice] = client.chat.completions.create(**ASK).choices
    assert (choice.message.content, calls(choice.message)) == (content, found)
    assert choice.finish_reason == ("tool_calls" if found else "stop")
    streamed, parts, finish = gathered(client.chat.completions.create(**ASK, stream=True))
    assert (streamed, [tuple(part[1:]) for part in parts], finish) == (content, found, choice.finish_reason)
    ids = [call.id for call in choice.message.tool_calls or []] + [part[0] for part in parts]
    assert len(set(ids)) == len(ids) and all(id.startswith("call_") for id in ids)


def test_arguments_come_token_by_token(roomy):
    says(roomy, PARIS)
    deltas = [c.choices[0].delta for c in roomy.client().chat.completions.create(**ASK, stream=True)]
    pieces = [delta.tool_calls[0].function.arguments for delta in deltas if delta.tool_calls]
    assert len(pieces) > 10 and "".join(pieces) == '{"city": "Paris"}' and deltas[0].content is None


def test_choices_have_calls_of_their_own(roomy):
    roomy.fake.script = lambda request: [*roomy.encode(PARIS if request.request_id.endswith("1") else "No."), roomy.IM_END]
    first, second = roomy.client().chat.completions.create(**ASK, n=2).choices
    assert (first.message.content, first.finish_reason, second.finish_reason) == ("No.", "stop", "tool_calls")
    assert first.message.tool_calls is None and second.message.content is None


def test_log_probabilities_of_all_tokens(roomy):
    says(roomy, TWO)
    client, fields = roomy.client(_strict_response_validation=True), {**ASK, "logprobs": True}
    [choice] = client.chat.completions.create(**fields).choices
    chunks = list(client.chat.completions.create(**fields, stream=True))
    entries = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert entries == choice.logprobs.content and bytes(b for entry in entries for b in entry.bytes).decode() == TWO
    assert gathered(chunks)[0] == "Let me see."


def test_stop_strings_end_content_but_no_call(roomy):
    says(roomy, PARIS + " and more")
    fields = {**ASK, "stop": ["}", "aris", " and", "ore"]}
    [choice] = roomy.client().chat.completions.create(**fields).choices
    assert calls(choice.message) == [("get_weather", '{"city": "Paris"}')] and choice.message.content is None
    assert (choice.finish_reason, choice.stop_reason) == ("tool_calls", " and")
    says(roomy, "Well, " + PARIS)
    [choice] = roomy.client().chat.completions.create(**{**ASK, "stop": ["ll", "Paris"]}).choices
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("We", "stop", None)
    says(roomy, "Well, ill.")
    [choice] = roomy.client().chat.completions.create(**ASK, stop=["ll"], extra_body={"min_tokens": 5}).choices
    assert (choice.message.content, choice.finish_reason) == ("Well, i", "stop")  # the first one came too early


def test_at_most_one_call(roomy):
    says(roomy, TWO)
    for stream in (False, True):
        answer = roomy.client().chat.completions.create(**ASK, parallel_tool_calls=False, stream=stream)
        found = gathered(answer)[1] if stream else calls(answer.choices[0].message)
        assert [part[-2:] if stream else list(part) for part in found] == [["get_weather", '{"city": "Paris"}']]
        roomy.wait_idle()
        assert len(roomy.fake.aborted) == 1 + stream  # the rest is not computed


def test_a_model_that_calls_for_ever(roomy):
    says(roomy, PARIS * 40, group=50)
    [choice] = roomy.client().chat.completions.create(**ASK, max_tokens=4000).choices
    assert len(choice.message.tool_calls) == 32 and choice.finish_reason == "tool_calls"


def test_an_answer_cut_in_a_call(roomy):
    says(roomy, PARIS)
    [choice] = roomy.client().chat.completions.create(**ASK, max_tokens=len(PARIS) - 20).choices
    assert choice.finish_reason == "length" and '{"city": "Paris"}'.startswith(calls(choice.message)[0][1])
    text = roomy.raw("GET", "/metrics")[2].decode()
    assert 'mini_llm:tool_calls_total{api="0",model_name="acme/tiny",state="broken"} ' in text


def test_a_template_that_knows_no_tools_is_told_in_hermes_form(roomy):
    says(roomy, "ok")
    client = roomy.client()
    client.chat.completions.create(**ASK)
    text = prompt(roomy)
    assert text.startswith("system\nYou may call functions") and text.endswith("user\nhi\nassistant\n")
    shown = [json.loads(line) for line in text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")]
    assert [tool["function"]["name"] for tool in shown] == ["get_weather", "f"] and shown[0]["function"] == WEATHER
    client.chat.completions.create(**{**ASK, "messages": [{"role": "system", "content": "Be kind."}, *USER]})
    assert prompt(roomy) == text.replace("system\n", "system\nBe kind.\n\n", 1)
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    results = [{"role": "tool", "tool_call_id": id, "content": id.upper()} for id in "ab"]
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": [made, {**made, "id": "b"}]}, *results]
    client.chat.completions.create(model="acme/tiny", messages=history)  # without tools, too
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    results = "<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response>"
    assert prompt(roomy) == f"user\nhi\nassistant\n{call}\n{call}\nuser\n{results}\nassistant\n"


def test_a_template_that_knows_them_gets_them(fresh_server):
    server = fresh_server(template=CHATML)
    says(server, "ok")
    schema = json.dumps(WEATHER["parameters"])
    made = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    history = [*USER, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "a", "content": "sun"}]
    server.client().chat.completions.create(**{**ASK, "messages": history, "tools": TOOLS[:1]})
    assert prompt(server) == f"[get_weather {schema}]user\nhiassistant\nget_weather(Rome)tool\nsun of get_weather"
    made["function"]["arguments"] = "{broken"  # as a model wrote it
    server.client().chat.completions.create(model="acme/tiny", messages=history)
    assert prompt(server) == "user\nhiassistant\nget_weather()tool\nsun of get_weather"
    status, _, raw = server.raw("POST", "/tokenize", {"messages": USER, "tools": TOOLS[:1], "add_generation_prompt": False})
    server.chat(messages=USER, tools=TOOLS[:1])
    assert json.loads(raw)["tokens"] == server.fake.requests[-1].prompt_ids
    server.chat(messages=[*USER, {"role": "assistant", "content": "zyx"}], tools=TOOLS[:1], continue_final_message=True)
    assert prompt(server).endswith("assistant\nzyx")


def test_which_tools_are_shown_and_read(roomy):
    says(roomy, PARIS)
    for choice, shown in (("auto", 2), ("none", 0), (allowed("auto", "f"), 1), (allowed("auto", "get_weather", "f"), 2)):
        [answer] = roomy.client().chat.completions.create(**ASK, tool_choice=choice).choices
        assert prompt(roomy).count('"type": "function"') == shown
        assert answer.message.content == (None if shown else PARIS)


STRICT = [{"type": "function", "function": {**WEATHER, "strict": True}}]


@pytest.mark.parametrize(("fields", "texts", "others"), [
    ({"tool_choice": "required"}, [PARIS, f"{PARIS}\n{PARIS}"], ["", "Hm. " + PARIS]),
    ({"tool_choice": "required", "parallel_tool_calls": False}, [PARIS], [f"{PARIS}\n{PARIS}"]),
    ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, [PARIS], [f"{PARIS}\n{PARIS}", OTHER]),
    ({"tool_choice": allowed("required", "get_weather")}, [PARIS, f"{PARIS}\n{PARIS}"], [OTHER]),
    ({"tools": STRICT}, ["", "Hm.", "Hm. " + PARIS], [PARIS.replace("city", "town"), OTHER]),
])  # fmt: skip
def test_calls_that_a_grammar_makes(roomy, fields, texts, others):
    says(roomy, PARIS)
    answer = roomy.chat(**{"tools": TOOLS, **fields})[2]
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls" and call["function"]["arguments"] == '{"city": "Paris"}'
    grammar = compiled(roomy.fake.requests[-1].params.grammar)
    assert all(accepts(grammar, text) for text in texts) and not any(accepts(grammar, text) for text in others)


def test_the_same_grammar_by_every_api(roomy):
    says(roomy, PARIS)
    named = {"type": "function", "name": "get_weather"}
    flat, message = [{**FLAT[0], "strict": True}], {**MESSAGE, "tools": BLOCKS[:1]}
    for path, body in (
        ("responses", {"input": "hi", "tools": FLAT[:1], "tool_choice": "required"}),
        ("responses", {"input": "hi", "tools": FLAT[:1], "tool_choice": named}),
        ("responses", {"input": "hi", "tools": flat}),
        ("messages", {**message, "tool_choice": {"type": "any"}}),
        ("messages", {**message, "tool_choice": {"type": "tool", "name": "get_weather"}}),
        ("messages", {**MESSAGE, "tools": [{**BLOCKS[0], "strict": True}]}),
    ):  # fmt: skip
        status, _, raw = roomy.raw("POST", f"/v1/{path}", body)
        answer = json.loads(raw)
        [call] = answer["output" if path == "responses" else "content"]
        assert status == 200 and call["name"] == "get_weather"
        if body.get("tool_choice") == named:
            assert answer["tool_choice"] == named
    texts = [request.params.grammar.text for request in roomy.fake.requests]
    assert texts[0] == texts[3] and texts[1] == texts[4] and texts[2] == texts[5] and len(set(texts)) == 3


JSON_OBJECT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tools": STRICT}, JSON_OBJECT])
def test_a_grammar_of_tags_that_are_control_tokens(fresh_server, fields):
    server = fresh_server(special=("<tool_call>", "</tool_call>"), info=fresh_server.ROOMY)
    open_id, close_id = server.IM_END + 1, server.IM_END + 2
    inside = PARIS.removeprefix("<tool_call>").removesuffix("</tool_call>")
    server.fake.script = lambda request: [open_id, *server.encode(inside), close_id, server.IM_END]
    [choice] = server.client().chat.completions.create(**{**ASK, **fields}).choices
    assert calls(choice.message) == [("get_weather", '{"city": "Paris"}')] and choice.message.content is None
    grammar = compiled(server.fake.requests[-1].params.grammar)
    assert accepts(grammar, open_id, inside, close_id) and not accepts(grammar, PARIS)


def test_mistrals_form_is_that_of_its_control_tokens(fresh_server):
    for special, form in (((), mistral.FORM), (("[TOOL_CALLS]",), mistral.FORM), (("[TOOL_CALLS]", "[ARGS]"), mistral.NEWER)):
        assert fresh_server(special=special, tool_parser="mistral").app.state.service.calls.form is form


def test_a_strict_schema_that_cannot_be_enforced(roomy):
    bad = {"type": "object", "properties": {"a": {"type": "string", "not": {}}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "h", "parameters": bad, "strict": True}}]
    status, _, answer = roomy.chat(tools=tools)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "tools[2]", "invalid_json_schema") and "/a/not" in error["message"]
    tools[2]["function"]["strict"] = False
    says(roomy, PARIS)
    assert roomy.chat(tools=tools, tool_choice="required")[0] == 200


def test_tags_that_are_control_tokens(fresh_server):
    tags = ("<tool_call>", "</tool_call>")
    server = fresh_server(special=tags, info=fresh_server.ROOMY)
    open_id, close_id = server.IM_END + 1, server.IM_END + 2
    inside = server.encode('{"name": "f", "arguments": {}}')
    for ids, content, found in (
        ([open_id, *inside, close_id], None, [("f", "{}")]),
        ([*server.encode("ab"), open_id, server.IM_START, *server.encode("cd"), close_id], "abcd", []),
    ):
        server.fake.script = lambda request, ids=ids: [*ids, server.IM_END]
        [choice] = server.client().chat.completions.create(**ASK).choices
        assert (choice.message.content, calls(choice.message)) == (content, found)
    [choice] = server.client().chat.completions.create(**ASK, extra_body={"skip_special_tokens": False}).choices
    assert choice.message.content == "ab<tool_call><|im_start|>cd</tool_call>"
    assert server.chat()[2]["choices"][0]["message"]["content"] == "abcd"  # without tools


@pytest.mark.parametrize(("template", "setting", "text"), [
    ("{{ tools }}[TOOL_CALLS]", "auto", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
    ("{{ tools }}<|python_tag|>", "auto", '{"name": "f", "parameters": {"a": 1}}'),
    ("{{ tools }}[func_name1(", "auto", "[f(a=1)]"),
    ("{{ tools }}<tool_call>", "auto", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
    ("{{ tools }}", "pythonic", "[f(a=1)]"),
])  # fmt: skip
def test_the_family_is_read_off_the_template(fresh_server, template, setting, text):
    server = fresh_server(template=template, tool_parser=setting, info=fresh_server.ROOMY)
    says(server, text)
    [choice] = server.client().chat.completions.create(**ASK).choices
    assert calls(choice.message) == [("f", '{"a": 1}')]
    if "TOOL_CALLS" in template:
        assert len(choice.message.tool_calls[0].id) == 9 and choice.message.tool_calls[0].id.isalnum()


def test_a_form_that_cannot_be_described_is_refused(fresh_server):
    server = fresh_server(tool_parser="mistral")
    status, _, answer = server.chat(tools=TOOLS)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "chat_template_missing")
    assert server.chat(tools=TOOLS, tool_choice="none")[0] == 200


# ---- /v1/responses and /v1/messages -----------------------------------------------------------------------------------------


def test_responses_through_the_client(roomy):
    says(roomy, TWO)
    client = roomy.client(_strict_response_validation=True)
    ask = {"model": "acme/tiny", "tools": FLAT, "tool_choice": "auto"}
    whole = client.responses.create(**ask, input="hi")
    text, first, second = whole.output
    assert (text.type, text.content[0].text, whole.status) == ("message", "Let me see.", "completed")
    assert (first.type, first.name, first.arguments) == ("function_call", "get_weather", '{"city": "Paris"}')
    assert first.status == second.status == "completed"
    assert (second.name, second.arguments) == ("f", "{}") and first.call_id != second.call_id
    assert whole.tools[0].name == "get_weather" and whole.tool_choice == "auto" and whole.parallel_tool_calls
    *_, last = client.responses.create(**ask, input="hi", stream=True)
    same = [{**item.model_dump(), "id": None, "call_id": None} for item in last.response.output]
    assert same == [{**item.model_dump(), "id": None, "call_id": None} for item in whole.output]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": call.name} for call in (first, second)]
    says(roomy, "ok")
    client.responses.create(model="acme/tiny", input=[{"role": "user", "content": "hi"}, *whole.output, *outputs])
    flat = prompt(roomy)
    made = [{"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in (first, second)]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": call["id"], "content": call["function"]["name"]} for call in made]
    roomy.chat(messages=[*USER, {"role": "assistant", "content": "Let me see.", "tool_calls": made}, *results])
    assert prompt(roomy) == flat and "<tool_response>\nget_weather\n" in flat


def test_the_events_of_a_response_with_calls(roomy):
    says(roomy, TWO, group=1000)
    found = typed_events(roomy.raw("POST", "/v1/responses", {"input": "hi", "tools": FLAT, "stream": True})[2])
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"] * 2,
        "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["output_index"] for event in found[2:-1]] == [0] * 6 + [1] * 4 + [2] * 4
    added, delta, done, ended = found[8:12]
    assert added["item"]["arguments"] == "" and added["item"]["status"] == "in_progress"
    assert delta["delta"] == done["arguments"] == ended["item"]["arguments"] == '{"city": "Paris"}'
    assert added["item"]["id"] == delta["item_id"] == done["item_id"] == ended["item"]["id"]
    assert found[-1]["response"]["output"] == [found[7]["item"], found[11]["item"], found[15]["item"]]


MESSAGE = {"model": "acme/tiny", "max_tokens": 500, "messages": USER, "tools": BLOCKS}


def test_messages_with_calls(roomy):
    says(roomy, TWO)
    whole = json.loads(roomy.raw("POST", "/v1/messages", MESSAGE)[2])
    text, first, second = whole["content"]
    assert text == {"type": "text", "text": "Let me see."} and whole["stop_reason"] == "tool_use"
    assert (first["type"], first["name"], first["input"], second["input"]) == ("tool_use", "get_weather", {"city": "Paris"}, {})
    found = typed_events(roomy.raw("POST", "/v1/messages", {**MESSAGE, "stream": True})[2])
    kinds = [event["type"] for event in found if event["type"] != "content_block_delta"]
    assert kinds == ["message_start", *["content_block_start", "content_block_stop"] * 3, "message_delta", "message_stop"]
    assert [event["index"] for event in found if event["type"] == "content_block_start"] == [0, 1, 2]
    parts = [event["delta"]["partial_json"] for event in found if event.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(parts) == '{"city": "Paris"}{}' and len(parts) > 10
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": first["id"], "content": [{"type": "text", "text": "sun"}]},
               {"type": "tool_result", "tool_use_id": second["id"], "is_error": True, "content": "no"},
               {"type": "text", "text": "So?"}]  # fmt: skip
    says(roomy, "ok")
    history = [*USER, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": results}]
    body = {**MESSAGE, "messages": history}
    assert json.loads(roomy.raw("POST", "/v1/messages", body)[2])["content"][0]["text"] == "ok"
    assert prompt(roomy).endswith(
        "assistant\nLet me see.\n" + '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\nuser\n<tool_response>\nsun\n</tool_response>\n'
        "<tool_response>\nError: no\n</tool_response>\nuser\nSo?\nassistant\n"
    )  # fmt: skip
    counted = json.loads(roomy.raw("POST", "/v1/messages/count_tokens", body)[2])
    assert counted == {"input_tokens": len(roomy.fake.requests[-1].prompt_ids)}


def test_messages_choices_of_tools(roomy):
    says(roomy, TWO)
    for kind, alone, used in (("none", False, 0), ("auto", False, 2), ("auto", True, 1)):
        choice = {"type": kind, "disable_parallel_tool_use": alone}
        whole = json.loads(roomy.raw("POST", "/v1/messages", {**MESSAGE, "tool_choice": choice})[2])
        assert sum(block["type"] == "tool_use" for block in whole["content"]) == used
    says(roomy, '<tool_call>{"name": "f", "arguments": {"a": broken}}</tool_call>')
    whole = json.loads(roomy.raw("POST", "/v1/messages", MESSAGE)[2])
    assert whole["content"][0]["input"] == {"INVALID_JSON": '{"a": broken}}'}


BITS = ["<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": ', "{}", "}", PARIS, "\n", " ", "Hello", "é", "<", "x"]


@settings(max_examples=40, deadline=None)
@given(text=st.lists(st.sampled_from(BITS), max_size=8).map("".join), group=st.integers(1, 9), parallel=st.booleans(),
       stop=st.lists(st.sampled_from(["x", "He", "</tool", "}", "\n", "é<"]), max_size=2, unique=True),
       max_tokens=st.integers(1, 300), include=st.booleans())  # fmt: skip
def test_a_stream_says_what_the_whole_answer_says(_roomy, text, group, parallel, stop, max_tokens, include):
    _roomy.reset()
    fields = {**ASK, "parallel_tool_calls": parallel, "stop": stop, "max_tokens": max_tokens, "logprobs": True,
              "extra_body": {"include_stop_str_in_output": include}}  # fmt: skip
    says(_roomy, text)
    [whole] = _roomy.client().chat.completions.create(**fields).choices
    says(_roomy, text, group)
    chunks = list(_roomy.client().chat.completions.create(**fields, stream=True))
    content, parts, finish = gathered(chunks)
    assert (content or "") == (whole.message.content or "") and finish == whole.finish_reason
    assert [tuple(part[1:]) for part in parts] == calls(whole.message)
    assert [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content] == whole.logprobs.content
    if stop:
        return
    said = [*calls(whole.message), *([whole.message.content] if whole.message.content else [])]
    body = {"parallel_tool_calls": parallel, "tools": FLAT, "input": "hi", "max_output_tokens": max_tokens}
    for stream in (False, True):
        raw = _roomy.raw("POST", "/v1/responses", {**body, "stream": stream})[2]
        output = (typed_events(raw)[-1]["response"] if stream else json.loads(raw))["output"]
        found = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
        texts = "".join(item["content"][0]["text"] for item in output if item["type"] == "message")
        assert found + ([texts] if texts else []) == said
