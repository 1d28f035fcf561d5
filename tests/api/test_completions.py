"""Text completions: prompt forms, echo, log-probabilities in the old shape, indexes."""

import json

import pytest

from deployments.transport.base import NotReady


def complete(server, **fields):
    status, _, raw = server.raw("POST", "/v1/completions", fields)
    return status, json.loads(raw)


def test_through_the_client(server):
    answer = server.client().completions.create(model="acme/tiny", prompt="ab")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.choices[0].text == "Hello world!" and answer.choices[0].finish_reason == "stop"
    assert server.fake.requests[0].prompt_ids == server.encode("ab")
    assert server.fake.requests[0].params.max_tokens == 16
    stream = server.client().completions.create(model="acme/tiny", prompt="ab", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world!"


def test_every_form_of_prompt(server):
    server.fake.script = lambda request: [*request.prompt_ids, server.IM_END]
    for prompt, texts in [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ]:
        status, answer = complete(server, prompt=prompt)
        assert status == 200 and [choice["text"] for choice in answer["choices"]] == texts


def test_index_is_prompt_times_n_plus_k(server):
    server.fake.script = lambda request: [*request.prompt_ids, *server.encode(str(request.params.seed)), server.IM_END]
    status, answer = complete(server, prompt=["p", "q"], n=2, seed=7, best_of=2)
    assert [c["text"] for c in answer["choices"]] == ["p7", "p8", "q7", "q8"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    texts = ["", "", "", ""]
    for chunk in server.stream("/v1/completions", prompt=["p", "q"], n=2, seed=7)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["p7", "p8", "q7", "q8"]


def test_echo(server):
    assert complete(server, prompt="ab", echo=True)[1]["choices"][0]["text"] == "abHello world!"
    assert complete(server, prompt=[97, 98], echo=True)[1]["choices"][0]["text"] == "abHello world!"
    first, *rest = server.stream("/v1/completions", prompt="ab", echo=True)[:-1]
    assert first["choices"][0]["text"] == "ab"
    assert "".join(chunk["choices"][0]["text"] for chunk in rest) == "Hello world!"
    before = len(server.fake.requests)
    status, answer = complete(server, prompt="ab", echo=True, max_tokens=0)
    assert status == 200 and answer["choices"][0]["text"] == "ab" and answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["finish_reason"] == "length" and len(server.fake.requests) == before


def test_echo_is_not_searched_for_stop_strings(server):
    answer = complete(server, prompt="a!b", echo=True, stop="!")[1]["choices"][0]
    assert answer["text"] == "a!bHello world" and answer["stop_reason"] == "!"


def test_logprobs(server):
    answer = complete(server, prompt="ab", logprobs=2)[1]["choices"][0]
    assert answer["logprobs"] == {
        "tokens": ["Hello", " world", "!"],
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{"A": -0.5, "B": -1.5, word: -0.25} for word in ("Hello", " world", "!")],
        "text_offset": [0, 5, 11],
    }
    none = complete(server, prompt="ab", logprobs=0)[1]["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{"Hello": -0.5}, {" world": -0.5}, {"!": -0.5}]


def test_streamed_logprobs_keep_their_offsets(server):
    server.fake.script = lambda request: [*server.encode("é st!"), server.IM_END]
    tokens, offsets = [], []
    for chunk in server.stream("/v1/completions", prompt="ab", logprobs=1, stop="stop")[:-1]:
        shown = chunk["choices"][0]["logprobs"]
        if shown:
            tokens += shown["tokens"]
            offsets += shown["text_offset"]
    assert tokens == ["\ufffd", "\ufffd", " ", "s", "t", "!"] and offsets == [0, 0, 1, 2, 3, 4]


def test_offsets_count_what_the_text_has(server):
    """No control tokens that are not shown, and a character that begins in the prompt as one."""
    server.fake.script = lambda request: [0xA9, server.IM_START, *server.encode("ab!"), server.IM_END]
    for skip, offsets in ((True, [0, 1, 1, 3]), (False, [0, 1, 13, 15])):
        answer = complete(server, prompt=[97, 0xC3], logprobs=0, skip_special_tokens=skip)[1]["choices"][0]
        assert answer["text"] == "é" + ("" if skip else "<|im_start|>") + "ab!"
        assert answer["logprobs"]["text_offset"] == offsets


def test_harmless_values_of_unsupported_fields(server):
    assert complete(server, prompt="a", suffix="", best_of=1, response_format={"type": "text"}, user="me")[0] == 200


def test_add_special_tokens_reaches_the_tokenizer(server):
    service = server.app.state.service
    seen = []
    original = service.tokenizer.encode
    service.tokenizer.encode = lambda text, **kwargs: seen.append(kwargs) or original(text, **kwargs)
    try:
        complete(server, prompt="a", add_special_tokens=False)
        complete(server, prompt="a")
    finally:
        del service.tokenizer.encode
    assert [one["add_special_tokens"] for one in seen] == [False, True]


def test_control_tokens_in_a_text_are_obeyed(server):
    """Who renders a chat template sends text."""
    text = "<|im_start|>user\nab<|im_end|>\n"
    n = len(text)
    for prompt in (text, [text, "c"]):
        answer = complete(server, prompt=prompt, echo=True, max_tokens=1, logprobs=0)[1]["choices"][0]
        ids = server.fake.requests[-1 if prompt == text else -2].prompt_ids
        assert ids == [server.IM_START, *server.encode("user\nab"), server.IM_END, 10]
        assert answer["text"] == text + "Hello" and answer["logprobs"]["text_offset"][-3:] == [n - 11, n - 1, n]
    server.chat(messages=[{"role": "user", "content": text}])
    assert server.fake.requests[-1].prompt_ids.count(server.IM_START) == 2  # a message is only text


def test_a_long_prompt_is_tokenised_too(server):
    assert complete(server, prompt="x" * 3200, max_tokens=1)[0] == 200  # 200 tokens of 16 letters, through the pool
    assert len(server.fake.requests[0].prompt_ids) == 200


def test_only_the_last_tokens_of_a_prompt_are_used(server):
    long = "z" * 1000 + "abHello"
    for prompt, kept in ((long, [122, 260, 256]), ([1, 2, 3, 4, 5], [3, 4, 5]), ("H", [72])):
        answer = server.client().completions.create(
            model="acme/tiny", prompt=prompt, max_tokens=2, echo=True, extra_body={"truncate_prompt_tokens": 3})  # fmt: skip
        assert server.fake.requests[-1].prompt_ids == kept and answer.usage.prompt_tokens == len(kept)
        assert answer.choices[0].text.startswith(bytes(kept).decode() if max(kept) < 256 else "zabHello")
    server.client().chat.completions.create(
        model="acme/tiny", messages=[{"role": "user", "content": long}], max_tokens=1, extra_body={"truncate_prompt_tokens": 9})
    assert len(server.fake.requests[-1].prompt_ids) == 9
    for bad in (0, -2, 1.5):
        status, _, body = server.raw("POST", "/v1/completions", {"prompt": "a", "truncate_prompt_tokens": bad})
        assert status == 400 and json.loads(body)["error"]["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(("fields", "kept"), [
    ({"max_tokens": 56}, 200), ({}, 240), ({"max_tokens": 256}, 1), ({"max_tokens": 0, "echo": True, "logprobs": 0}, 256),
])  # fmt: skip
def test_a_prompt_may_be_cut_to_what_fits(server, fields, kept):
    """The context, 256 tokens, less what the answer may have."""
    status, answer = complete(server, prompt="z" * 1000, truncate_prompt_tokens=-1, **fields)
    assert status == 200 and answer["usage"]["prompt_tokens"] == kept == len(server.fake.requests[0].prompt_ids)
    assert complete(server, prompt="ab", truncate_prompt_tokens=-1, echo=True)[1]["choices"][0]["text"].startswith("ab")
    answer = server.chat(messages=[{"role": "user", "content": "z" * 1000}], truncate_prompt_tokens=-1)[2]
    assert answer["usage"]["prompt_tokens"] == 255  # room for one token, if nothing else was said


def test_token_ids_come_with_the_answer(server):
    ask = {"model": "acme/tiny", "extra_body": {"return_token_ids": True}}
    text = server.client().completions.create(prompt=[[260], [1, 2]], **ask)
    answered = server.encode("Hello world!") + [server.IM_END]
    assert [(one.prompt_token_ids, one.token_ids) for one in text.choices] == [([260], answered), ([1, 2], answered)]
    chat = server.client().chat.completions.create(messages=[{"role": "user", "content": "hi"}], n=2, **ask)
    assert chat.prompt_token_ids == server.fake.requests[-1].prompt_ids
    assert [one.token_ids for one in chat.choices] == [answered, answered]
    assert not hasattr(server.client().completions.create(model="acme/tiny", prompt="a").choices[0], "token_ids")


def test_token_ids_come_with_a_stream(server):
    server.fake.script = lambda request: [*server.encode("Hello é st!"), server.IM_END]
    chunks = server.stream("/v1/completions", prompt=["ab", "c"], n=2, echo=True, stop="sty", return_token_ids=True)[:-1]
    for index in range(4):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["text"] == ["ab", "c"][index // 2] and "token_ids" not in own[0]
        assert own[0]["prompt_token_ids"] == server.encode(own[0]["text"])
        assert sum((one["token_ids"] for one in own[1:]), []) == [*server.encode("Hello é st!"), server.IM_END]
        assert own[1]["token_ids"] == server.encode("Hello")
        assert next(one for one in own if "é" in one["text"])["token_ids"] == list("é".encode())
    first, *rest = server.stream(return_token_ids=True)[:-1]
    assert first["prompt_token_ids"] == server.fake.requests[-1].prompt_ids
    assert sum((one["choices"][0]["token_ids"] for one in rest), []) == [*server.encode("Hello é st!"), server.IM_END]
    assert "token_ids" not in str(server.stream()) and "token_ids" not in str(server.stream("/v1/completions", prompt="a"))


def test_choices_of_a_long_prompt_start_when_its_pages_are_cached(server):
    produced = []
    server.fake.script = lambda request: produced.append(server.fake.produced) or server.encode("Hello world!")
    server.fake.first_delay = 0.02
    status, answer = complete(server, prompt="z" * 100, n=3, max_tokens=3)
    assert status == 200 and [c["text"] for c in answer["choices"]] == ["Hello world!"] * 3
    assert produced[0] == 0 and min(produced[1:]) >= 1 and len(produced) == 3
    begun = []
    server.fake.script = lambda request: begun.append(len(server.fake.requests)) or server.encode("Hello world!")
    assert complete(server, prompt=["z" * 100, "y" * 100, "z"], n=2, max_tokens=3)[0] == 200
    assert begun[0] == 3 + 4  # both first choices of the long prompts, and both of the short one


def test_a_first_choice_that_fails_takes_the_others_along(server):
    server.fake.failure = NotReady("gone")
    assert complete(server, prompt="z" * 100, n=3)[0] == 503
    assert len(server.fake.requests) == 1


def test_a_request_id_ends_the_answers_id(server):
    for _ in range(2):  # the engine must not see it twice
        assert complete(server, prompt="a", request_id="mine-7", n=2)[1]["id"] == "cmpl-mine-7"
    assert len({request.request_id for request in server.fake.requests}) == 4
    for bad in ("", "a b", "é", "x" * 129):
        assert complete(server, prompt="a", request_id=bad)[1]["error"]["param"] == "request_id"


def test_cache_salt_reaches_the_engine(server):
    assert complete(server, prompt="a", cache_salt="tenant 1")[0] == complete(server, prompt="a")[0] == 200
    assert [request.cache_salt for request in server.fake.requests] == ["tenant 1", ""]
    for salt in ("", "a@b", "a/b", "a\\b", "a\0b", "x" * 129, 3):
        status, answer = complete(server, prompt="a", cache_salt=salt)
        assert status == 400 and answer["error"]["param"] == "cache_salt", salt
