"""The API over a fake engine: a uvicorn server on 127.0.0.1 in a thread, a byte tokenizer with a few longer tokens."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import openai
import pytest
import uvicorn
from pydantic import ConfigDict

from deployments.api.app import create_app
from deployments.api.tracing import Tracer
from deployments.protocol.access import Access
from deployments.protocol.limits import Limits
from deployments.tools.family import ToolParser
from deployments.transport.base import NotReady
from model_core.engine.request import EngineInfo, EngineStats, PromptLogprobs, Request, TokenEvent, TokenLogprobs
from model_core.tokenizer.chat import ChatTemplate
from model_core.tokenizer.split import AddedToken
from model_core.tokenizer.tokenizer import Codec, Tokenizer

if sys.version_info < (3, 11):  # which schemathesis needs
    collect_ignore = ["test_openapi.py", "test_openai_document.py"]

WORDS = ["Hello", " world", "!", " END", "ab", "cd", "x" * 16]
IM_START, IM_END = 256 + len(WORDS), 257 + len(WORDS)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INFO = EngineInfo(
    model="acme/tiny",
    source="disk",
    family="llama",
    parameters=1000,
    dtype="float32",
    device="cpu",
    context_length=256,
    pool_tokens=4096,
    max_seqs=8,
    vocab_size=IM_END + 1,
    eos_ids=(IM_END,),
)
ROOMY = replace(INFO, context_length=4096)


def encode(text: str, first: bool = True) -> list[int]:
    """Longest known word, else one byte."""
    data, ids, at = text.encode(), [], 0
    words = sorted(enumerate(WORDS, 256), key=lambda pair: -len(pair[1]))
    while at < len(data):
        for token, word in words:
            if data.startswith(word.encode(), at):
                ids.append(token)
                at += len(word)
                break
        else:
            ids.append(data[at])
            at += 1
    return ids


def make_tokenizer(chat: bool = True, template: str = TEMPLATE, special: tuple[str, ...] = ()) -> Tokenizer:
    """special: more control tokens, with ids from IM_END + 1 on."""
    names = ["<|im_start|>", "<|im_end|>", *special]
    codec = Codec(
        encode=encode,
        token_bytes=[bytes([i]) for i in range(256)] + [word.encode() for word in WORDS] + [n.encode() for n in names],
        added=[AddedToken(name, id) for name, id in zip(names, count(IM_START), strict=False)],
        eos_ids=(IM_END,),
    )
    return Tokenizer(codec, ChatTemplate({"default": template}) if chat else None)


class LimitsForTests(Limits):
    """Small, and changeable while the server runs."""

    model_config = ConfigDict(frozen=False)
    max_body_bytes: int = 20_000
    max_queued_requests: int = 8
    queue_timeout_s: float | None = 20.0
    request_timeout_s: float | None = 30.0


def hello(request: Request) -> list[int]:
    return [*encode("Hello world!"), IM_END]


def endless(request: Request) -> list[int]:
    return [97] * 10_000


def scores(ids: list[int], count: int) -> list[PromptLogprobs]:
    """Of each token but the first, in parts of three: its own at place p is -p / 2 and of rank 2, the others are as in
    FakeTransport's answers."""
    parts = []
    for first in range(1, len(ids), 3):
        places = range(first, min(first + 3, len(ids)))
        top = [(65 + k, -0.25 - k) for _ in places for k in range(count)]
        parts.append(PromptLogprobs(count, array("f", [-place / 2 for place in places]), array("i", [2] * len(places)),
                                    array("i", [i for i, _ in top]), array("f", [value for _, value in top])))  # fmt: skip
    return parts


@dataclass
class FakeTransport:
    """An engine in the same process. `script(request)` are the ids it would generate; it ends at a stop id or at
    max_tokens like the real one. `fail_after`: raise `failure` after so many lists of events.
    """

    script: Callable[[Request], list[int]] = hello
    group: int = 1  # tokens per list of events
    first_delay: float = 0.0
    delay: float = 0.0
    failure: Exception | None = None
    fail_after: int = 0
    ready: bool = True
    cached: int = 0
    waits: tuple[float, float] | None = (0.002, 0.004)
    told: EngineInfo = INFO
    requests: list[Request] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted: dict[str, float] = field(default_factory=dict)  # id → time.monotonic
    produced: int = 0

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    async def info(self) -> EngineInfo:
        if not self.ready:
            raise NotReady("loading")
        return self.told

    async def stats(self) -> list[EngineStats]:
        if not self.ready:
            return []
        return [EngineStats(len(self.running), 0, 100, 60, 15, 7, 11, 13, 17, 5, 2, 1.5, 0.0, 90.0, 1.5, (1,) * 14, 77, 3)]

    async def dispatch_table(self) -> list[dict]:
        return [{"op": "rmsnorm", "choice": "torch"}]

    async def generate(self, request: Request) -> AsyncIterator[list[TokenEvent]]:
        assert request.request_id not in self.running
        self.requests.append(request)
        self.running.add(request.request_id)
        done = False
        try:
            await asyncio.sleep(self.first_delay)
            params = request.params
            if params.prompt_logprobs is not None:
                for part in scores(request.prompt_ids, params.prompt_logprobs):
                    yield [TokenEvent(request.request_id, [], prompt=part)]
            if params.max_tokens == 0:
                done = True
                yield [TokenEvent(request.request_id, [], "length", waits=self.waits)]
                return
            ids = self.script(request)[: params.max_tokens]
            ends = set(params.stop_ids) | (set() if params.ignore_eos else set(INFO.eos_ids))
            for i, token in enumerate(ids):
                if token in ends:
                    ids = ids[: i + 1]
                    break
            for at in range(0, len(ids), self.group):
                if self.failure is not None and at // self.group >= self.fail_after:
                    raise self.failure
                part = ids[at : at + self.group]
                last = at + self.group >= len(ids)
                finish = ("stop" if part[-1] in ends else "length") if last else None
                logprobs = None
                if params.logprobs is not None:
                    top = [(65 + k, -0.5 - k) for k in range(params.logprobs)]
                    logprobs = [TokenLogprobs(-0.25 if top else -0.5, top) for _ in part]
                self.produced += len(part)
                done = last
                told_once = (0, None) if at else (self.cached, self.waits)
                yield [TokenEvent(request.request_id, part, finish, logprobs, None, *told_once)]
                await asyncio.sleep(self.delay)
            if self.failure is not None and not done:
                raise self.failure
        finally:
            self.running.discard(request.request_id)
            if not done:
                self.aborted[request.request_id] = time.monotonic()


def events(raw: bytes) -> list:
    """Strict reading of an SSE body: only data lines and comments, LF only; parsed events, comments as strings."""
    assert b"\r" not in raw and raw.endswith(b"\n\n")
    result: list = []
    for block in raw.decode().split("\n\n")[:-1]:
        assert "\n" not in block, block
        if block.startswith(": "):
            result.append(block)
        else:
            assert block.startswith("data: "), block
            result.append("[DONE]" if block == "data: [DONE]" else json.loads(block[6:]))
    return result


def typed_events(raw: bytes) -> list:
    """The same of an SSE body whose events are named by their types."""
    found: list = []
    for block in raw.decode().split("\n\n")[:-1]:
        if block.startswith(": "):
            found.append(block)
            continue
        event, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert event == f"event: {found[-1]['type']}"
    return found


class Server:
    """A uvicorn server in a thread. `fake` and `limits` may be changed between requests."""

    IM_START, IM_END = IM_START, IM_END
    INFO, ROOMY = INFO, ROOMY
    encode = staticmethod(encode)
    events = staticmethod(events)

    def __init__(
        self, tokenizer: Tokenizer, access: Access | None = None, tracer: Tracer | None = None, *,
        info: EngineInfo = INFO, tool_parser: ToolParser = "auto",
    ) -> None:  # fmt: skip
        self._told = info
        self.fake = FakeTransport(told=info)
        self.limits = LimitsForTests()
        self.app = create_app(self.fake, tokenizer, self.limits, access, tracer=tracer, tool_parser=tool_parser)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else the kernel holds megabytes of answers
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self.app, log_level="warning", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def gate(self):
        return self.app.state.service.gate

    def reset(self) -> None:
        self.fake.__init__(told=self._told)  # type: ignore[misc]
        self.limits.__init__()  # type: ignore[misc]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def client(self, **kwargs) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20, **kwargs)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20)

    def raw(self, method: str, path: str, body: bytes | dict | None = None, headers: dict[str, str] | None = None):
        """(status, headers, body bytes) of a request without any client library's help."""
        import http.client

        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        default = {"content-type": "application/json"} if data is not None else {}
        connection.request(method, path, data, default if headers is None else headers)
        response = connection.getresponse()
        result = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return result

    def chat(self, **fields) -> tuple[int, dict[str, str], dict]:
        fields.setdefault("messages", [{"role": "user", "content": "hi"}])
        status, headers, body = self.raw("POST", "/v1/chat/completions", fields)
        return status, headers, json.loads(body)

    def stream(self, path: str = "/v1/chat/completions", **fields) -> list:
        """The events of a streamed answer."""
        if "chat" in path and "prompt" not in fields:
            fields.setdefault("messages", [{"role": "user", "content": "hi"}])
        status, headers, body = self.raw("POST", path, {"stream": True, **fields})
        assert status == 200, body
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
        assert "content-length" not in headers and "content-encoding" not in headers
        return events(body)

    def wait_idle(self, seconds: float = 2.0) -> None:
        end = time.monotonic() + seconds
        while self.fake.running or self.gate.active:
            assert time.monotonic() < end, f"still running: {self.fake.running}, active: {self.gate.active}"
            time.sleep(0.002)


@pytest.fixture(scope="session")
def _server() -> Iterator[Server]:
    server = Server(make_tokenizer())
    yield server
    server.stop()


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    _server.reset()
    yield _server
    _server.wait_idle()


@pytest.fixture(scope="session")
def _roomy() -> Iterator[Server]:
    server = Server(make_tokenizer(), info=ROOMY)
    yield server
    server.stop()


@pytest.fixture
def roomy(_roomy: Server) -> Iterator[Server]:
    """A server whose context holds the description of tools."""
    _roomy.reset()
    yield _roomy
    _roomy.wait_idle()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def fresh_server() -> Iterator[Callable[..., Server]]:
    """Makes servers of a test's own: fresh_server(chat=False) has a model without a chat template."""
    servers: list[Server] = []

    def make(
        chat: bool = True, access: Access | None = None, tracer: Tracer | None = None, *, template: str = TEMPLATE,
        special: tuple[str, ...] = (), info: EngineInfo = INFO, tool_parser: ToolParser = "auto",
    ) -> Server:  # fmt: skip
        servers.append(Server(make_tokenizer(chat, template, special), access, tracer, info=info, tool_parser=tool_parser))
        return servers[-1]

    make.ROOMY = ROOMY  # type: ignore[attr-defined]
    yield make
    for server in servers:
        server.stop()
