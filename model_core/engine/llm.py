"""The engine as a library: text in, text out, in one process."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import (
    UNANSWERABLE,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from model_core.errors import EngineDead, RequestError
from model_core.tokenizer.detokenizer import Detokenizer
from model_core.tokenizer.load import load_tokenizer
from model_core.tokenizer.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass(frozen=True)
class Chunk:
    """What one engine step added to a stream; `finish` is set on the last."""

    text: str
    token_ids: list[int]
    finish: FinishReason | None = None


@dataclass
class Completion:
    """A finished sequence. text ends before a stop string; token_ids hold all that was computed."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)  # of its second token and all after it, in parts


class LLM:
    """One model on one device. Safe to use from several threads; close it, or use it in a `with`.

    with LLM.load("weight/SmolLM2-135M-Instruct") as llm:
        print(llm.generate(["The sea is"], SamplingParams(max_tokens=20))[0].text)
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._numbers = itertools.count()
        self._queues: dict[str, queue.SimpleQueue[TokenEvent]] = {}
        self._lock = threading.Lock()
        engine.start(self._deliver)

    @classmethod
    def load(cls, path: Path | str, config: EngineConfig | None = None) -> LLM:
        """path: a model folder or .gguf file. Raises CheckpointError, UnsupportedModel, ConfigError, OutOfMemory."""
        tokenizer = load_tokenizer(Path(path))
        return cls(Engine.load(path, config), tokenizer)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 stop: Sequence[str] = ()) -> list[Completion]:  # fmt: skip
        """Continue all prompts (texts or token ids) in one batch; results in their order. Of a single one: a list of one.

        params: one for all, or one per prompt. Raises RequestError before anything runs if a request can never be served, later
        if it turns out to be so (a grammar and min_tokens that allow no token), EngineDead if the engine fails.
        """
        prompts = _several(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} sampling params: give one, or one per prompt")
        streams = [_Stream(self, self.encode(prompt), one, stop) for prompt, one in zip(prompts, each, strict=True)]
        for stream in streams:
            stream.check()
        try:
            for stream in streams:
                stream.start()
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.completion for stream in streams]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, stop: Sequence[str] = ()) -> Iterator[Chunk]:
        """The same for one prompt, step by step. Closing the iterator aborts the sequence."""
        stream = _Stream(self, self.encode(prompt), params or SamplingParams(), stop)
        stream.start()
        try:
            yield from stream
        finally:
            stream.close()

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams | None = None, *,
             stop: Sequence[str] = ()) -> Completion:  # fmt: skip
        """Answer a conversation ({"role": ..., "content": ...}) by the model's own template."""
        return self.generate([self.encode_chat(messages)], params, stop=stop)[0]

    def encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.tokenizer.encode_chat(messages)

    def close(self) -> None:
        """Stop the engine's thread; running sequences end with finish "abort"."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _deliver(self, events: list[TokenEvent]) -> None:
        with self._lock:
            for event in events:
                waiting = self._queues.get(event.request_id)
                if waiting is not None:
                    waiting.put(event)

    def _submit(self, prompt_ids: list[int], params: SamplingParams) -> tuple[str, queue.SimpleQueue[TokenEvent]]:
        key = f"llm-{next(self._numbers)}"
        waiting: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        with self._lock:
            self._queues[key] = waiting
        try:
            self.engine.submit(Request(key, prompt_ids, params))
        except BaseException:
            self._forget(key)
            raise
        return key, waiting

    def _forget(self, key: str) -> None:
        with self._lock:
            self._queues.pop(key, None)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single one is no list of its letters or ids."""
    if isinstance(prompts, str) or (prompts and all(isinstance(one, int) for one in prompts)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


class _Stream:
    """One sequence: events become text; a stop string aborts it."""

    def __init__(self, llm: LLM, prompt_ids: list[int], params: SamplingParams, stop: Sequence[str]) -> None:
        self.completion = Completion(prompt_tokens=len(prompt_ids))
        self._llm, self._prompt_ids, self._params = llm, prompt_ids, params
        self._text = Detokenizer(llm.tokenizer, stop=stop, prompt_ids=prompt_ids)
        self._key: str | None = None
        self._ended = False

    def check(self) -> None:
        """Raises RequestError if it can never be served."""
        self._llm.engine.prepare(Request("check", self._prompt_ids, self._params))

    def start(self) -> None:
        self._key, self._events = self._llm._submit(self._prompt_ids, self._params)

    def __iter__(self) -> Iterator[Chunk]:
        while not self._ended:
            chunk = self._take(self._events.get())
            if chunk.text or chunk.finish or chunk.token_ids:
                yield chunk

    def close(self) -> None:
        if self._key is not None:
            if not self._ended:
                self._llm.engine.abort(self._key)
            self._llm._forget(self._key)

    def _take(self, event: TokenEvent) -> Chunk:
        done = self.completion
        if event.finish == "error":
            self._ended = True
            error = event.error or "the engine failed"
            raise RequestError(error, code="no_token_allowed") if error.startswith(UNANSWERABLE) else EngineDead(error)
        done.token_ids += event.token_ids
        done.logprobs += event.logprobs or []
        if event.prompt is not None:
            done.prompt_logprobs.append(event.prompt)
        done.cached_tokens = done.cached_tokens or event.cached_tokens
        printed = event.token_ids[:-1] if event.finish == "stop" else event.token_ids  # its last is the end token
        text = self._text.push(printed)
        finish = event.finish
        if self._text.stopped is not None:
            finish = "stop"
            if event.finish is None:
                assert self._key is not None
                self._llm.engine.abort(self._key)
        elif finish is not None:
            text += self._text.finish()
        done.text += text
        if finish is not None:
            self._ended, done.finish = True, finish
        return Chunk(text, event.token_ids, finish)
