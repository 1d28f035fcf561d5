"""Log-probabilities of prompts: vLLM's `prompt_logprobs`, and echo with logprobs as lm-eval scores texts."""

import json

import pytest

from deployments.protocol import prompt_logprobs as module
from model_core.engine.validate import MAX_PROMPT_LOGPROBS

ECHO = {  # of "ab Hello", with one alternative
    "tokens": ["ab", " ", "Hello"],
    "token_logprobs": [None, -0.5, -1.0],
    "top_logprobs": [None, {"A": -0.25, " ": -0.5}, {"A": -0.25, "Hello": -1.0}],
    "text_offset": [0, 2, 3],
}
ANSWER = {
    "tokens": ["Hello", " world", "!"],
    "token_logprobs": [-0.25] * 3,
    "top_logprobs": [{"A": -0.5, word: -0.25} for word in ("Hello", " world", "!")],
    "text_offset": [8, 13, 19],
}
SCORED = [  # the same prompt in vLLM's form
    None,
    {"32": {"logprob": -0.5, "rank": 2, "decoded_token": " "}, "65": {"logprob": -0.25, "rank": 1, "decoded_token": "A"}},
    {"256": {"logprob": -1.0, "rank": 2, "decoded_token": "Hello"}, "65": {"logprob": -0.25, "rank": 1, "decoded_token": "A"}},
]


def complete(server, **fields):
    status, _, raw = server.raw("POST", "/v1/completions", {"prompt": "ab Hello", **fields})
    return status, json.loads(raw)


def joined(parts):
    return {key: sum((part[key] for part in parts), []) for key in ECHO}


def test_echo_with_logprobs(server):
    choice = complete(server, echo=True, logprobs=1)[1]["choices"][0]
    assert choice["text"] == "ab HelloHello world!"
    assert choice["logprobs"] == joined([ECHO, ANSWER])
    assert [request.params.prompt_logprobs for request in server.fake.requests] == [1]
    assert all(choice["text"][at:].startswith(token) for at, token in
               zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True))  # fmt: skip


def test_a_stream_says_the_same(server):
    first, *others = server.stream("/v1/completions", prompt="ab Hello", echo=True, logprobs=1, prompt_logprobs=1)[:-1]
    assert first["choices"] == [
        {"index": 0, "text": "ab Hello", "logprobs": ECHO, "finish_reason": None, "prompt_logprobs": SCORED}]  # fmt: skip
    assert joined([c["choices"][0]["logprobs"] for c in others if c["choices"][0]["logprobs"]]) == ANSWER
    assert not any("prompt_logprobs" in chunk["choices"][0] for chunk in others)


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_without_an_answer(server, stream):
    """As lm-eval does where a server allows it; the prompt may fill the context."""
    fields = {"echo": True, "max_tokens": 0, "temperature": 0}
    if stream:
        first, last = server.stream("/v1/completions", prompt="ab Hello", logprobs=1, **fields)[:-1]
        choice = first["choices"][0] | {"finish_reason": last["choices"][0]["finish_reason"]}
    else:
        answer = complete(server, logprobs=1, **fields)[1]
        assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 3
        [choice] = answer["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("ab Hello", ECHO, "length")
    assert complete(server, prompt=[97] * 256, logprobs=0, **fields)[0] == 200
    status, answer = complete(server, prompt=[97] * 257, logprobs=0, **fields)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_prompts_and_choices_have_their_own(server):
    """Each prompt is scored once, by its first choice; the others wait for it."""
    server.fake.first_delay = 0.01
    ask = {"prompt": [[260, 32, 256], [99], [261, 33]], "n": 2, "echo": True, "logprobs": 0, "prompt_logprobs": 1, "seed": 1}
    choices = complete(server, **ask)[1]["choices"]
    assert sorted((request.params.prompt_logprobs is not None, request.params.seed) for request in server.fake.requests) == [
        (False, 2), (False, 2), (False, 2), (True, 1), (True, 1), (True, 1)]  # fmt: skip
    assert [choice["text"] for choice in choices[::2]] == [text + "Hello world!" for text in ("ab Hello", "c", "cd!")]
    for first, second in zip(choices[::2], choices[1::2], strict=True):
        assert first["logprobs"] == second["logprobs"] and first["prompt_logprobs"] == second["prompt_logprobs"]
    assert choices[0]["prompt_logprobs"] == SCORED and choices[2]["prompt_logprobs"] == [None]
    assert choices[4]["logprobs"]["tokens"][:2] == ["cd", "!"]
    assert choices[0]["logprobs"]["top_logprobs"][:2] == [None, {" ": -0.5}]  # none asked for, so only its own
    firsts = {}
    for chunk in server.stream("/v1/completions", **ask)[:-1]:
        firsts.setdefault(chunk["choices"][0]["index"], chunk["choices"][0])
    assert [firsts[i]["prompt_logprobs"] for i in range(6)] == [choice["prompt_logprobs"] for choice in choices]
    assert complete(server, **ask | {"max_tokens": 0})[1]["choices"][1]["logprobs"]["tokens"] == ["ab", " ", "Hello"]


def test_a_chats_prompt(server):
    answer = server.chat(prompt_logprobs=1, n=2, messages=[{"role": "user", "content": "é"}])[1 + 1]
    ids = server.fake.requests[0].prompt_ids
    assert [None if one is None else next(iter(one)) for one in answer["prompt_logprobs"]] == [None, *map(str, ids[1:])]
    assert "prompt_logprobs" not in answer["choices"][0]
    chunks = server.stream(prompt_logprobs=1, n=2, messages=[{"role": "user", "content": "é"}])[:-1]
    assert chunks[0]["prompt_logprobs"] == answer["prompt_logprobs"]
    assert all("prompt_logprobs" not in chunk for chunk in chunks[1:])
    assert "prompt_logprobs" not in server.chat()[2]


def test_what_the_tokenizer_puts_in_front_is_not_in_the_text(server):
    """Begin tokens and a first word's space: offsets are counted from the end of the echo."""
    names = server.app.state.service.tokenizer
    found = module.echo_json(names, [server.IM_START, 32, 97, 260], server_scores(4), 0, "aab")
    assert found["text_offset"] == [0, 0, 0, 1]
    assert module.echo_json(names, [97, *"é".encode(), 98], server_scores(4), 0, "aéb")["text_offset"] == [0, 1, 1, 2]


def server_scores(tokens):
    from array import array

    from model_core.engine.request import PromptLogprobs

    return [PromptLogprobs(0, array("f", [-1.0] * (tokens - 1)), array("i", [1] * (tokens - 1)), array("i"), array("f"))]


def test_lm_evals_own_reading(server):
    """token_logprobs[ctxlen:-1], and whether each is the best of its alternatives."""
    request = {"prompt": [[97, 260, 33]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1, "echo": True}
    logprobs = complete(server, **request)[1]["choices"][0]["logprobs"]
    context = 1
    values = logprobs["token_logprobs"][context:-1]
    assert values == [-0.5, -1.0]
    tops = logprobs["top_logprobs"][context:-1]
    assert [max(top.values()) == value for top, value in zip(tops, values, strict=True)] == [False, False]


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"prompt_logprobs": 21}, "prompt_logprobs", "<= 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", ">= 0"),
    ({"prompt_logprobs": True}, "prompt_logprobs", "an integer"),
    ({"prompt_logprobs": "1"}, "prompt_logprobs", "an integer"),
    ({"prompt": [[1] * 250] * 60, "prompt_logprobs": 20}, "prompt_logprobs", f"an answer holds {MAX_PROMPT_LOGPROBS}"),
    ({"prompt": [[1] * 250] * 60, "logprobs": 20, "echo": True}, "logprobs", "fewer or shorter prompts"),
    ({"max_tokens": 0, "logprobs": 1}, "max_tokens", "0 only with 'echo'"),
    ({"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens", "0 only with 'echo'"),
])  # fmt: skip
def test_what_is_refused(server, fields, param, words):
    server.limits.max_queued_requests, server.limits.max_body_bytes = 100, 1 << 20
    status, answer = complete(server, **fields)
    assert status == 400 and answer["error"]["param"] == param and words in answer["error"]["message"]
    assert not server.fake.requests
