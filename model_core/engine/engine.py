"""The engine: one thread that schedules, launches, reads tokens and emits them, step after step."""

from __future__ import annotations

import gc
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_core.engine.clock import MOST_AHEAD, Span
from model_core.engine.config import EngineConfig
from model_core.engine.inbox import Inbox
from model_core.engine.load import Parts, load_parts
from model_core.engine.numerics import numerics_of
from model_core.engine.outbox import Outbox
from model_core.engine.plan import StepPlan, check_request
from model_core.engine.records import Launched, StepRecord, StepRing, us
from model_core.engine.request import EngineInfo, EngineStats, FinishReason, Request, TokenEvent
from model_core.engine.validate import validate
from model_core.errors import EngineDead, RequestError
from model_core.threads import yield_to_others
from model_core.weights.sample import sample_of

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled

logger = logging.getLogger("mini_llm.engine")

OnStep = Callable[[list[TokenEvent]], None]
_LOOK_S = 5e-3  # from one look at new requests to the next, while all sequences wait for masks
_PAUSE_US = 5000  # for which another thread may keep the interpreter to itself (sys.getswitchinterval)
_QUIET_S = 0.25  # without work before a graph is captured: 20 ms or more, in which one of a client's next requests would wait
_MAX_FAILED_STEPS = 3  # in a row; after that the fault is the engine's, not a request's


class _Abandoned(Exception):
    """All sequences of the step that is being computed have left."""


class Engine:
    """Continuous batching over one model on one device.

    Methods may be called from any thread. `on_step` is called from the engine's thread, once per step, with the events
    of all requests; it must return quickly and not raise.
    """

    def __init__(self, parts: Parts, config: EngineConfig, *, name: str, source: str = "disk", weights: str = "") -> None:
        """weights: what tells them from others of the same shapes."""
        self.parts, self.config = parts, config
        self.info = EngineInfo(
            model=name, source=source, family=parts.model.family, parameters=parts.model.num_parameters,
            dtype=str(parts.dtype).removeprefix("torch."), device=parts.device.type,
            context_length=parts.limits.max_context,
            pool_tokens=parts.scheduler.pool.capacity * config.page_size, max_seqs=parts.limits.max_seqs,
            vocab_size=parts.model.vocab_size, eos_ids=parts.model.eos_ids, numerics=numerics_of(parts, config, weights))
        self.records = StepRing()
        self.stage = "not started"  # what the thread does now, for the watchdog's message
        self.failure: str | None = None
        self._inbox = Inbox()
        self._outbox = Outbox(parts.scheduler)
        self._thread: threading.Thread | None = None
        self._on_step: OnStep = lambda events: None
        self._stopping = False
        self._progress_at = -math.inf  # nobody has come yet
        self._step_ms = 0.0
        self._failed_steps = 0
        self._steps = 0
        self._seeds = random.Random(config.seed)
        self._most_ahead = MOST_AHEAD if parts.device.type == "cuda" else 0  # a CPU step is done when launch returns
        self._before: Span | None = None  # of the newest step, unless the engine had nothing to do since

    @classmethod
    def load(cls, path: Path | str, config: EngineConfig | None = None, *, name: str | None = None,
             source: str = "disk") -> Engine:
        """Load a checkpoint (a folder or a GGUF file). Raises CheckpointError, UnsupportedModel, ConfigError, OutOfMemory."""
        config = config or EngineConfig()
        parts = load_parts(Path(path), config)
        return cls(parts, config, name=name or Path(path).name, source=source, weights=sample_of(Path(path)))

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    def start(self, on_step: OnStep) -> None:
        """Start the engine's thread. Once per engine."""
        assert self._thread is None, "the engine was started already"
        self._on_step = on_step
        gc.freeze()  # what is here by now stays: a collection that looks through it stops every thread for 0.2 s
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its events follow through on_step. Raises RequestError at once if it can never be served
        (values out of range, too long), EngineDead if nobody would answer. Compiles its grammar unless `prepare` did."""
        if not self.alive:
            raise EngineDead(f"the engine is not running: {self.failure or self.stage}")
        request = self._seeded(request)
        grammar = self.prepare(request)
        self.parts.scheduler.check_id(request.request_id)
        if not self._inbox.submit(request, grammar):
            raise EngineDead(f"the engine is not running: {self.failure or self.stage}")

    def _seeded(self, request: Request) -> Request:
        """With a seed of its own, so that it goes on with the same noise after a preemption."""
        if request.params.seed is not None:
            return request
        return replace(request, params=replace(request.params, seed=self._seeds.getrandbits(63)))

    def prepare(self, request: Request) -> Compiled | None:
        """Check a request and compile its grammar, if it has one: blocks for as long as that takes. Raises RequestError."""
        validate(request, self.info.vocab_size)
        check_request(request, self.parts.limits, self.parts.scheduler.pool)
        spec = request.params.grammar
        if spec is None:
            return None
        if not (self.info.eos_ids or request.params.stop_ids):
            raise RequestError(f"this model has no end token: {spec.param} needs stop_token_ids", param="stop_token_ids",
                               code="invalid_value")  # fmt: skip
        return self.parts.grammars.get(spec)

    def abort(self, request_id: str) -> None:
        """End a request; its last event has finish "abort". Unknown ids are ignored."""
        self._inbox.abort(request_id)

    def stats(self) -> EngineStats:
        s, pool = self.parts.scheduler, self.parts.scheduler.pool
        return EngineStats(
            running=s.running, waiting=s.waiting + len(self._inbox), pages_total=pool.capacity, pages_free=pool.free,
            pages_cached=pool.cached, steps=self._steps, prompt_tokens=s.prompt_tokens,
            generation_tokens=s.generation_tokens, prefix_queries=s.prefix_queries, prefix_hits=s.prefix_hits,
            preemptions=s.preemptions, step_ms=self._step_ms,
            last_step_age_s=time.monotonic() - self._progress_at if s.has_work else 0.0,
            gpu_busy_s=self.records.gpu_busy, gpu_idle_s=self.records.gpu_idle,
            step_tokens=tuple(self.records.step_tokens), computed_tokens=self.records.computed_tokens,
            graphs_to_capture=self.parts.runner.unprepared)

    def dispatch_table(self) -> list[dict[str, Any]]:
        """Which implementation runs for which op and shape, and why."""
        return self.parts.runner.explain()

    def shutdown(self) -> None:
        """Stop after the step in flight; live requests end with finish "abort"."""
        self._stopping = True
        self._inbox.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
        self.parts.grammars.close()
        gc.unfreeze()  # else a process that goes on would keep the weights and the cache of an engine that nobody holds

    # ---- the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.parts.device.type == "cpu":
            yield_to_others()
        flights: deque[Launched] = deque()
        try:
            while not self._stopping:
                if idle := not (self.parts.scheduler.has_work or flights):
                    self._before = None
                self._read_inbox(wait=self._prepare() if idle else 0)
                self._turn(flights)
                self._flush()
        except BaseException as error:  # the last line of defence: say it, end every request, let the health check see
            logger.exception("the engine thread failed at step %d (%s)", self._steps, self.stage)
            self.failure = f"{type(error).__name__}: {error}"
        self.stage = "stopped"
        reason: FinishReason = "error" if self.failure else "abort"
        unread = self._inbox.close()
        for request_id in [*self.parts.scheduler.reasons(), *unread]:
            self._outbox.last(request_id, reason, self.failure and f"engine: {self.failure}")
        try:
            self._flush()
        except Exception:  # what failed may have been on_step itself
            logger.exception("the last events of %d requests could not be delivered", len(unread))

    def _prepare(self) -> float | None:
        """Use a quiet time: at start, or between two clients, not between two requests of one. Requests are looked at between
        two pieces of such work. Returns the seconds to wait for one before there is more; None: there is no more."""
        self.stage = "preparing"
        if not self.parts.runner.unprepared:
            return None
        noise = self._progress_at + _QUIET_S - time.monotonic()
        if noise <= 0 and not self._inbox:
            self.parts.runner.prepare()
        return max(noise, 0)

    def _read_inbox(self, wait: float | None = 0) -> None:
        self.stage = "reading requests" if wait == 0 else "idle"
        for item in self._inbox.read(wait):
            self._progress_at = time.monotonic()
            if isinstance(item, tuple):
                self._add(*item)
            else:
                self._outbox.end(item, "abort")

    def _add(self, request: Request, grammar: Compiled | None) -> None:
        try:
            self.parts.scheduler.add(request, grammar)
        except RequestError as error:  # only a duplicate id comes as far as this
            logger.warning("refused a request: %s", error)

    def _turn(self, flights: deque[Launched]) -> None:
        """Schedule and launch a step, then read the oldest one as soon as enough others are behind it. The next one can then
        sample what waited for that one's tokens."""
        began = time.perf_counter()
        ahead = self._lookahead(flights)
        launched = len(flights) <= ahead and self._launch(flights)
        if flights and (len(flights) > ahead or not launched or flights[0].flight.over):
            self._collect(flights.popleft())
            self._step_ms = 1e3 * (time.perf_counter() - began)
        if flights:
            self.stage = f"sampling step {flights[0].record.step}"
            flights[0].flight.finish()
        elif not launched:
            self._await_masks()

    def _await_masks(self) -> None:
        """Nothing can be scheduled: wait a moment for what all sequences that run may wait for."""
        if coming := self.parts.scheduler.coming():
            self.stage = "waiting for a mask"
            wait(coming, _LOOK_S, FIRST_COMPLETED)

    def _lookahead(self, flights: deque[Launched]) -> int:
        """Steps that may be in flight while another one is launched. One hides a turn of this thread, but not the pause that it
        makes when another thread has the interpreter: short decode steps that last as long are launched while nobody waits.
        A request that comes then waits for them, and of a sequence that stops so many rows are computed in vain. One with a
        grammar takes part in every step only if the one before is the only other one in flight: its rows are sampled, and
        the next step is launched, when that one's tokens are known."""
        s = self.parts.scheduler
        if self._inbox or s.waiting or s.constrained or not flights or flights[-1].flight.plan.chunks:
            return min(1, self._most_ahead)
        return min(self._most_ahead, max(1, -(-_PAUSE_US // max(1, self.records.gpu_us))))

    def _launch(self, flights: deque[Launched]) -> bool:
        """Schedule and launch a step; False if there is none."""
        began = time.perf_counter()
        self.stage = "scheduling"
        s = self.parts.scheduler
        plan = s.schedule()
        if plan is None:
            return False
        planned = time.perf_counter()
        self.stage = f"computing step {plan.step} ({plan.num_decodes} decodes, {plan.num_tokens} tokens)"
        try:
            flight = self.parts.runner.launch(plan, partial(self._proceed, plan))
        except _Abandoned:
            for entry in plan.entries:
                self._outbox.end(entry.seq.request_id, "abort")
            s.discard(plan)
            return False
        except Exception as error:
            while flights:
                self._collect(flights.popleft())
            self._fail_step(plan, error)
            return False
        record = StepRecord(
            plan.step, time.time(), plan.num_decodes, plan.num_tokens - plan.num_decodes, s.running, s.waiting,
            s.pool.available, len(plan.preempted), us(planned - began), us(time.perf_counter() - planned))
        flights.append(Launched(flight, self._before, record))
        self._before = flight.span
        s.launched(plan)
        return True

    def _proceed(self, plan: StepPlan) -> None:
        """Between two layers on a CPU, where a step takes long: stop if nobody waits for it any more."""
        if self._inbox.left and all(entry.seq.request_id in self._inbox.left for entry in plan.entries):
            raise _Abandoned

    def _collect(self, launched: Launched) -> None:
        """Read a step's tokens, commit them, queue their events, and note how long it all took."""
        flight, step = launched.flight, launched.record.step
        began = time.perf_counter()
        self.stage = f"waiting for step {step}"
        try:
            tokens, logprobs = flight.collect()
            scored = [one for scores in flight.scores for one in scores]
        except Exception as error:
            self._fail_step(flight.plan, error)
            return
        waited = time.perf_counter()
        self.stage = f"emitting step {step}"
        self._outbox.commit(flight.plan, tokens, logprobs, scored)
        self.records.append(launched.finished(waited - began, time.perf_counter() - waited))
        self._steps += 1
        self._failed_steps = 0
        self._progress_at = time.monotonic()

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """A step raised: its sequences end with an error, the others go on, unless it happens again and again."""
        logger.error("step %d failed (%s)", plan.step, self.stage, exc_info=error)
        self._failed_steps += 1
        if self._failed_steps >= _MAX_FAILED_STEPS or self.parts.device.type == "cuda":
            raise error  # a CUDA error is sticky: only a new process recovers
        for entry in plan.entries:
            if entry.seq.finish is None:
                self._outbox.end(entry.seq.request_id, "error", f"the step that computed this request failed: {error}")
        self.parts.scheduler.discard(plan)

    def _flush(self) -> None:
        if events := self._outbox.take():
            self._on_step(events)
