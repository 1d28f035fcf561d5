"""Calls of grpc.aio that are cancelled must leave no memory behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc.aio
import pytest
from grpc._cython import cygrpc

from benchmarks.heap import held
from deployments.grpc_batch import finish_batches

CALLS = 300  # which leave 452 KiB behind where nothing is mended, 103 of them on the server's side


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cygrpc, "execute_batch", cygrpc.execute_batch)  # so that it is as before afterwards
    finish_batches()
    yield


class Peer:
    """A server whose one method answers when its call is cancelled, as Serve's replicas do, and calls to it."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    async def late(self, request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("accepted", "1"),))
        self.begun += 1
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        self.ended += 1
        return b"cancelled"

    async def __aenter__(self) -> Peer:
        self._server = grpc.aio.server()
        handlers = {"Late": grpc.unary_unary_rpc_method_handler(self.late)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Peer", handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.call = self._channel.unary_unary("/Peer/Late")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()
        await self._server.stop(None)

    async def cancel(self, count: int, *, by_call: bool) -> None:
        """So many calls, each cancelled while it waits, of itself or with the task that waits for it."""
        calls = [self.call(b"") for _ in range(count)]
        waiting = [asyncio.ensure_future(_answer(call)) for call in calls]
        while self.begun - self.ended < count:
            await asyncio.sleep(0.01)
        for one in calls if by_call else waiting:
            one.cancel()
        for one in waiting:
            with suppress(asyncio.CancelledError):
                await one
            assert one.cancelled()
        while self.ended < self.begun:
            await asyncio.sleep(0.01)


async def _answer(call: Any) -> bytes:
    return await call


@pytest.mark.parametrize("by_call", [True, False])
def test_cancelled_calls_leave_nothing_in_use(by_call: bool) -> None:
    async def growth() -> list[float]:
        """KiB of each of some rounds; other threads of this process may allocate in one of them."""
        async with Peer() as peer:
            used = []
            for _ in range(5):
                for _ in range(CALLS // 50):
                    await peer.cancel(50, by_call=by_call)
                used.append(1024 * held()["used_mib"])
            return [after - before for before, after in zip(used, used[1:], strict=False)]

    assert min(asyncio.run(asyncio.wait_for(growth(), 120))) < CALLS / 5


def test_another_grpcio_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(cygrpc, "ExecuteBatchError")
    other = object()
    monkeypatch.setattr(cygrpc, "execute_batch", other)
    finish_batches()
    assert cygrpc.execute_batch is other and "cancelled calls may leave memory behind" in caplog.text


def test_twice_is_once() -> None:
    once = cygrpc.execute_batch
    finish_batches()
    assert cygrpc.execute_batch is once
