"""API keys at work: who a request comes from, and how much of its allowance is left."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from deployments.protocol.access import Access, ApiKey, by_digest, read_keys
from deployments.protocol.errors import rate_limited
from model_core.errors import ConfigError

log = logging.getLogger("mini_llm.api")

RELOAD_S = 1.0  # how often the keys_file is looked at, by the requests that come


class Bucket:
    """An allowance of `unit` that comes back at a steady rate: `per_minute` at once at most, and as many in any minute after
    that. What is only known later may overdraw it; it is then paid back first. now: seconds, monotonic."""

    def __init__(self, per_minute: int, now: float, unit: Literal["requests", "tokens"] = "requests") -> None:
        self.per_minute = per_minute
        self.unit = unit
        self._left = float(per_minute)
        self._at = now

    def check(self, now: float) -> None:
        """Raises ApiError 429 if nothing is left."""
        self._refill(now)
        if self._left < 1:
            wait = self.wait_s()
            words = f"Rate limit reached: {self.per_minute} {self.unit} per minute. Please try again in {_duration(wait)}."
            raise rate_limited(words, math.ceil(wait))

    def spend(self, count: int, now: float) -> None:
        self._refill(now)
        self._left -= count

    def wait_s(self) -> float:
        """Seconds from the last look until something is left."""
        return max(0.0, (1 - self._left) * 60 / self.per_minute)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers, as of the last look."""
        reset = (self.per_minute - self._left) * 60 / self.per_minute
        unit = self.unit.encode()
        return [
            (b"x-ratelimit-limit-" + unit, b"%d" % self.per_minute),
            (b"x-ratelimit-remaining-" + unit, b"%d" % max(self._left, 0)),
            (b"x-ratelimit-reset-" + unit, _duration(reset).encode()),
        ]

    def resize(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left = min(self._left, per_minute)

    def _refill(self, now: float) -> None:
        self._left = min(float(self.per_minute), self._left + (now - self._at) * self.per_minute / 60)
        self._at = now


class Holder:
    """The holder of one key in this HTTP replica."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.active = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.change(key, now)

    def change(self, key: ApiKey, now: float) -> None:
        """New limits from an edited file; what has been used stays used."""
        self.key = key
        self.requests = _changed(self.requests, key.requests_per_minute, "requests", now)
        self.tokens = _changed(self.tokens, key.tokens_per_minute, "tokens", now)

    @contextmanager
    def hold(self, now: float) -> Iterator[None]:
        """Counts a request inside the block. Raises ApiError 429 if the key has no more of them now."""
        most = self.key.concurrent_requests
        if most is not None and self.active >= most:
            raise rate_limited(f"This key may have {most} requests at a time, and has them.", 1)
        for bucket in (self.tokens, self.requests):
            if bucket is not None:
                bucket.check(now)
        if self.requests is not None:
            self.requests.spend(1, now)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1


def _changed(bucket: Bucket | None, per_minute: int | None, unit: Literal["requests", "tokens"], now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now, unit)
    bucket.resize(per_minute)
    return bucket


class KeyRing:
    """All keys, by digest. `clock`: monotonic seconds."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._fixed = access.keys
        self._path = None if access.keys_file is None else Path(access.keys_file)
        self._stamp: tuple[int, int] | None = None
        self._looked_at = -math.inf
        self._holders: dict[bytes, Holder] = {}
        self._set(self._fixed)

    def find(self, secret: bytes) -> Holder | None:
        """The holder of a key. Takes the same time whatever it is: all digests are compared, each in constant time."""
        self._reload()
        given = hashlib.sha256(secret).digest()
        found = None
        for digest, holder in self._holders.items():
            if hmac.compare_digest(digest, given):
                found = holder
        return found

    def _reload(self) -> None:
        now = self.clock()
        if self._path is None or now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._set([*self._fixed, *read_keys(self._path)])
                self._stamp = stamp
        except (OSError, ConfigError) as error:  # a file that is being edited must not lock everybody out
            log.error("the API keys stay as they were: %s", error)

    def _set(self, keys: list[ApiKey]) -> None:
        now = self.clock()
        found = by_digest(keys)  # may raise, before anything has changed
        for digest in self._holders.keys() & found.keys():
            self._holders[digest].change(found[digest], now)
        self._holders = {digest: self._holders.get(digest) or Holder(key, now) for digest, key in found.items()}


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.4g}s"
