"""API keys, their limits, CORS: who gets in, and what the others are told."""

import asyncio
import hashlib
import json
import os
import threading

import openai
import pytest
import yaml

from deployments.api.app import create_app
from deployments.api.keys import RELOAD_S, Bucket, KeyRing
from deployments.protocol.access import Access, ApiKey, read_keys
from deployments.protocol.errors import ApiError
from deployments.settings import AppArgs, parse_args
from model_core.errors import ConfigError, MiniLLMError

BODY = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"


def digest(key):
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key):
    return {**JSON, "authorization": f"Bearer {key}"}


def keys(**limits):
    return Access(keys=[ApiKey(name="alice", key="sk-alice", **limits), ApiKey(name="bob", sha256=digest("sk-bob"))])


def error_of(body):
    answer = json.loads(body)
    assert list(answer) == ["error"] and list(answer["error"]) == ["message", "type", "param", "code"]
    return answer["error"]


@pytest.fixture
def guarded(fresh_server):
    return fresh_server(access=keys())


@pytest.mark.parametrize(
    "headers",
    [
        bearer("sk-alice"),
        {**JSON, "authorization": "bearer  sk-bob "},
        {**JSON, "x-api-key": "sk-alice"},
        {**JSON, "x-api-key": "wrong", "authorization": "Bearer sk-bob"},
    ],
)
def test_good_keys(guarded, headers):
    assert guarded.raw("POST", CHAT, BODY, headers)[0] == 200
    assert guarded.raw("GET", "/v1/models", None, headers)[0] == 200


BAD = [
    JSON,
    bearer("sk-alic"),
    bearer("sk-alice2"),
    bearer(""),
    bearer("\xe9"),
    bearer(digest("sk-bob")),  # who reads the configuration's digest has no key
    {**JSON, "authorization": "sk-alice"},
    {**JSON, "authorization": "Basic sk-alice"},
    {**JSON, "x-api-key": "Bearer sk-alice"},
    {**JSON, "authorization": "Bearer wrong", "x-api-key": "sk-alice"},
]


@pytest.mark.parametrize("headers", BAD)
def test_no_key_and_wrong_keys_get_the_same_answer(guarded, headers):
    for method, path, body in [("POST", CHAT, BODY), ("GET", "/v1/models", None), ("GET", "/nowhere", None)]:
        status, answered, raw = guarded.raw(method, path, body, headers)
        error = error_of(raw)
        assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
        assert answered["www-authenticate"] == "Bearer" and answered["x-request-id"]
        assert error["message"].startswith("No valid API key provided.")
    assert not guarded.fake.requests


def test_a_large_body_without_a_key_is_refused_unread(guarded):
    assert guarded.raw("POST", CHAT, b"x" * 8_000_000, JSON)[0] == 401


def test_open_paths_and_the_official_client(guarded, fresh_server):
    for path in ("/health", "/ready", "/version", "/metrics", "/"):
        assert guarded.raw("GET", path)[0] == 200
    assert guarded.raw("GET", "/debug/dispatch")[0] == 401
    closed = fresh_server(access=keys().model_copy(update={"open_metrics": False}))
    assert closed.raw("GET", "/metrics")[0] == 401 and closed.raw("GET", "/metrics", None, bearer("sk-bob"))[0] == 200
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client().models.list()
    assert caught.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=guarded.url + "/v1", api_key="sk-bob", max_retries=0)
    assert client.chat.completions.create(model="", messages=BODY["messages"]).choices[0].message.content


def test_requests_per_minute(fresh_server):
    server = fresh_server(access=keys(requests_per_minute=2))
    for left in ("1", "0"):
        status, headers, _ = server.raw("POST", CHAT, {**BODY, "stream": True}, bearer("sk-alice"))
        assert status == 200 and headers["x-ratelimit-remaining-requests"] == left
        assert headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-reset-requests"].endswith("s")
    status, headers, body = server.raw("POST", CHAT, BODY, bearer("sk-alice"))
    error = error_of(body)
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert 25 <= int(headers["retry-after"]) <= 30 and headers["x-ratelimit-remaining-requests"] == "0"
    assert server.raw("GET", "/v1/models", None, bearer("sk-alice"))[0] == 200  # reading is free
    status, headers, _ = server.raw("POST", CHAT, BODY, bearer("sk-bob"))
    assert status == 200 and "x-ratelimit-limit-requests" not in headers  # another key, without limits
    metrics = server.raw("GET", "/metrics")[2].decode()
    assert 'vllm:admission_rejections_total{api="0",model_name="acme/tiny",reason="rate_limit_exceeded"} 1.0' in metrics


def test_a_key_may_not_go_ahead_of_others_beyond_its_priority(fresh_server):
    server = fresh_server(access=keys(min_priority=-1))
    for path, body in ((CHAT, BODY), ("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"})):
        for key, priority, expected in (("alice", -1, 200), ("alice", -2, 403), ("bob", -2, 200)):
            status, _, raw = server.raw("POST", path, {**body, "priority": priority}, bearer(f"sk-{key}"))
            assert status == expected
            if status == 403:
                error = error_of(raw)
                assert (error["type"], error["param"]) == ("permission_error", "priority")
                assert error["code"] == "insufficient_permissions"


def test_tokens_per_minute(fresh_server):
    """Prompt and answer are charged when they are known; an overdrawn allowance is paid back before the next request."""
    server = fresh_server(access=keys(tokens_per_minute=100, requests_per_minute=50))
    names = [f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")]
    status, headers, body = server.raw("POST", CHAT, BODY, bearer("sk-alice"))
    used = json.loads(body)["usage"]["total_tokens"]
    assert status == 200 and 20 < used < 50 and headers["x-ratelimit-remaining-requests"] == "49"
    assert headers[names[0]] == "100" and abs(int(headers[names[1]]) - (100 - used)) <= 1 and headers[names[2]].endswith("s")
    status, headers, _ = server.raw("POST", CHAT, {**BODY, "stream": True}, bearer("sk-alice"))
    assert status == 200 and abs(int(headers[names[1]]) - (100 - 2 * used + 3)) <= 2  # its answer is charged when it has come
    asked = 2
    while (answer := server.raw("POST", CHAT, {**BODY, "n": 3}, bearer("sk-alice")))[0] == 200:
        asked += 1
        assert asked < 6
    status, headers, body = answer
    error = error_of(body)
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert "100 tokens per minute" in error["message"] and headers[names[1]] == "0" and 1 <= int(headers["retry-after"]) <= 60
    assert headers["x-ratelimit-remaining-requests"] == str(50 - asked)  # who is refused for tokens keeps the request
    assert server.raw("POST", CHAT, {**BODY, "n": 0}, bearer("sk-bob"))[0] == 400
    assert server.raw("POST", CHAT, BODY, bearer("sk-bob"))[0] == 200


def test_concurrent_requests(fresh_server):
    server = fresh_server(access=keys(concurrent_requests=1))
    server.fake.first_delay = 0.3
    first = []
    thread = threading.Thread(target=lambda: first.append(server.raw("POST", CHAT, BODY, bearer("sk-alice"))[0]))
    thread.start()
    while not server.fake.running:
        pass
    status, headers, body = server.raw("POST", CHAT, BODY, bearer("sk-alice"))
    assert status == 429 and error_of(body)["code"] == "rate_limit_exceeded" and headers["retry-after"] == "1"
    assert server.raw("POST", CHAT, BODY, bearer("sk-bob"))[0] == 200
    thread.join()
    assert first == [200]
    assert server.raw("POST", CHAT, {**BODY, "n": 0}, bearer("sk-alice"))[0] == 400  # free again; a failure frees it too
    assert server.raw("POST", CHAT, BODY, bearer("sk-alice"))[0] == 200


def test_the_access_log_names_the_key_and_never_shows_it(guarded, caplog):
    caplog.set_level("INFO", "mini_llm.access")
    guarded.raw("POST", CHAT, BODY, bearer("sk-alice"))
    guarded.raw("POST", CHAT, BODY, bearer("sk-wrong"))
    guarded.raw("DELETE", CHAT, None, bearer("sk-bob"))
    while len(caplog.records) < 3:  # the line comes just after the answer
        pass
    lines = sorted((json.loads(record.getMessage()) for record in caplog.records), key=lambda line: line["status"])
    good, bad, method = lines
    assert (good["key"], good["status"]) == ("alice", 200)
    assert "key" not in bad and (bad["status"], bad["error"]) == (401, "invalid_api_key")
    assert (method["key"], method["status"], method["error"]) == ("bob", 405, "method_not_allowed")
    assert "sk-" not in caplog.text


def test_a_bucket_refills_at_its_rate_and_never_overflows():
    def take(now):
        try:
            bucket.check(now)
        except ApiError:
            return False
        bucket.spend(1, now)
        return True

    bucket = Bucket(per_minute=60, now=0.0)
    assert sum(take(0.0) for _ in range(100)) == 60
    assert bucket.wait_s() == pytest.approx(1.0) and not take(0.5) and bucket.wait_s() == pytest.approx(0.5)
    assert take(1.0) and not take(1.0)
    assert sum(take(10_000.0) for _ in range(100)) == 60
    bucket.spend(30, 10_000.0)  # overdrawn, so what comes back pays for that first
    assert bucket.wait_s() == pytest.approx(31.0) and not take(10_030.9) and take(10_031.1)
    # whatever the pattern, a minute lets through at most the burst and what came back in it
    bucket = Bucket(per_minute=7, now=0.0)
    assert sum(take(i * 0.1) for i in range(600)) <= 14


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "keys.yaml"

    def write(content, stamp):
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        os.utime(path, (stamp, stamp))

    now = 100.0
    ring = KeyRing(Access(keys=[ApiKey(name="ops", key="k0")], keys_file=str(path)), clock=lambda: now)
    write([{"name": "a", "key": "k1", "requests_per_minute": 2}], 1)
    holder = ring.find(b"k1")
    assert holder.key.name == "a" and ring.find(b"k0").key.name == "ops" and ring.find(b"k2") is None
    holder.requests.spend(2, now)
    write([{"name": "a", "key": "k1", "requests_per_minute": 5}, {"name": "b", "key": "k2"}], 2)
    assert ring.find(b"k2") is None  # looked at once a second
    now += RELOAD_S
    assert ring.find(b"k2").key.name == "b"
    assert ring.find(b"k1") is holder and holder.requests.wait_s() > 10  # the new limit, but what was used stays used
    write("- {name: c", 3)
    now += RELOAD_S
    assert ring.find(b"k2").key.name == "b" and "stay as they were" in caplog.text
    write([{"name": "b", "key": "k2"}], 4)
    now += RELOAD_S
    assert ring.find(b"k1") is None and ring.find(b"k2") and ring.find(b"k0")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"name": "a"}, "exactly one of key, sha256 and env"),
        ({"name": "a", "key": "secret", "env": "X"}, "exactly one of key, sha256 and env"),
        ({"name": "a", "sha256": "SECRET"}, "64 lower-case hexadecimal digits"),
        ({"name": "a", "key": ""}, "is empty"),
        ({"key": "secret"}, "name"),
        ({"name": "a", "key": "secret", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "a", "key": "secret", "rpm": 1}, "rpm"),
    ],
)
def test_mistakes_in_keys_are_named_and_the_key_is_not_shown(tmp_path, entry, message):
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry]))
    for read in (lambda: read_keys(tmp_path / "keys.yaml"), lambda: parse_args({"access": {"keys": [entry]}}, AppArgs)):
        with pytest.raises(MiniLLMError) as caught:
            read()
        assert message in str(caught.value) and "secret" not in str(caught.value).lower()


@pytest.mark.parametrize("content", ["", "a: 1", "[]", "[1]", "{", "- \xff"])
def test_files_that_hold_no_keys(tmp_path, content):
    path = tmp_path / "keys.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="keys.yaml"):
        read_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none.yaml")


def test_settled_access_holds_digests_only(tmp_path, monkeypatch):
    (tmp_path / "more.yaml").write_text(yaml.safe_dump([{"name": "c", "sha256": digest("k3")}]))
    access = Access(keys=[ApiKey(name="a", key="k1"), ApiKey(name="b", env="SOME_KEY")], keys_file="more.yaml")
    with pytest.raises(ConfigError, match="SOME_KEY of key 'b' is not set"):
        access.settled(tmp_path)
    monkeypatch.setenv("SOME_KEY", "k2")
    settled = access.settled(tmp_path)
    monkeypatch.delenv("SOME_KEY")
    assert [key.sha256 for key in settled.keys] == [digest("k1"), digest("k2")]
    assert not any(key.key or key.env for key in settled.keys) and "k1" not in repr(access)
    ring = KeyRing(settled)
    assert [ring.find(key).key.name for key in (b"k1", b"k2", b"k3")] == ["a", "b", "c"]


def test_a_key_that_is_listed_twice_is_an_error_that_names_both(tmp_path, caplog):
    """Else the later entry's limits would silently be those of both."""
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump([{"name": "c", "sha256": digest("k1"), "requests_per_minute": 1}]))
    key = ApiKey(name="a", key="k1")
    for access in (Access(keys=[key, ApiKey(name="c", sha256=digest("k1"))]), Access(keys=[key], keys_file="more.yaml")):
        with pytest.raises(ConfigError, match="^access: 'a' and 'c' are the same key; list it once$"):
            access.settled(tmp_path)
    ring = KeyRing(Access(keys=[key], keys_file=str(path)))
    assert ring.find(b"k1").requests is None and "the API keys stay as they were: access: 'a' and 'c'" in caplog.text


def test_an_application_below_a_prefix(server, caplog):
    """As Serve runs it with a route_prefix: the same paths are open, and routes have the same names in the log."""
    caplog.set_level("DEBUG", "mini_llm.access")
    app = create_app(server.fake, server.app.state.service.tokenizer, server.limits, keys())
    sent = []

    async def ask(method, path, headers=()):
        sent.clear()

        async def receive():
            return {"type": "http.request", "body": json.dumps(BODY).encode()}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "root_path": "/twin", "headers": list(headers)}
        await app({**scope, "query_string": b"", "server": ("127.0.0.1", 80), "scheme": "http"}, receive, send)
        return sent[0]["status"]

    headers = [(b"content-type", b"application/json"), (b"x-api-key", b"sk-bob")]
    asked = [("GET", "/twin/health"), ("GET", "/twin/metrics"), ("GET", "/twin/v1/models"), ("GET", "/twin/v1/models", headers)]
    assert [asyncio.run(ask(*one)) for one in asked] == [200, 200, 401, 200]
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["route"] for line in lines] == ["/health", "/metrics", "/v1/models", "/v1/models"]
    assert asyncio.run(ask("GET", "/twin/nowhere", headers)) == 404 and b"GET /twin/ lists" in sent[1]["body"]


def test_cors(fresh_server, server):
    page = "https://page.example"
    open_ = fresh_server(access=keys().model_copy(update={"cors_origins": [page]}))
    ask = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    status, headers, _ = open_.raw("OPTIONS", CHAT, None, ask)  # a preflight carries no key
    assert status == 200 and headers["access-control-allow-origin"] == page and headers["x-request-id"]
    assert "authorization" in headers["access-control-allow-headers"]
    status, headers, body = open_.raw("OPTIONS", CHAT, None, {**ask, "origin": "https://other.example"})
    assert status == 400 and error_of(body)["code"] == "cors_refused" and "access-control-allow-origin" not in headers
    for key, expected in (("sk-bob", 200), ("wrong", 401)):
        status, headers, _ = open_.raw("POST", CHAT, {**BODY, "stream": True}, {**bearer(key), "origin": page})
        assert status == expected and headers["access-control-allow-origin"] == page
        assert {"x-request-id", "request-id"} <= set(headers["access-control-expose-headers"].split(", "))
    status, headers, _ = server.raw("POST", CHAT, BODY, {**JSON, "origin": page})  # off by default
    assert status == 200 and "access-control-allow-origin" not in headers
    assert server.raw("OPTIONS", CHAT, None, ask)[0] == 405
