"""The model replica by itself: start-up, health, shutdown."""

from __future__ import annotations

import asyncio
import threading

import pytest

from deployments.replica import ModelReplica, load_engine
from deployments.transport.base import Overloaded
from model_core.errors import EngineDead, RequestError
from model_core.grammar.spec import BUSY, of_regex


def test_a_stalled_engine_is_unhealthy_and_names_its_stage(tools):
    async def run():
        async with tools.world(stall_timeout_s=0.2) as world:
            replica = world.replica
            replica.check_health()
            transport = await world.transport()
            reading = asyncio.ensure_future(tools.read(transport, tools.request("a", 5000)))
            await tools.until(lambda: world.engine._steps > 3)
            replica.check_health()
            world.engine.hang.set()
            await asyncio.sleep(0.4)
            with pytest.raises(RuntimeError, match=r"no progress for .* \(limit stall_timeout_s = 0.2\); it is computing step"):
                replica.check_health()
            world.engine.hang.clear()
            await tools.until(lambda: world.engine.stats().last_step_age_s < 0.1)
            replica.check_health()
            reading.cancel()
            await world.quiet()

    asyncio.run(run())


def test_an_idle_engine_is_healthy_however_long_it_waits(tools):
    async def run():
        async with tools.world(stall_timeout_s=0.05) as world:
            await asyncio.sleep(0.2)
            world.replica.check_health()

    asyncio.run(run())


def test_a_stopped_replica_ends_its_engine_thread_and_refuses(tools):
    async def run():
        async with tools.world() as world:
            transport = await world.transport()
            assert len(await tools.read(transport, tools.request("a", 3))) == 3
            world.replica.__del__()
            assert not world.engine.alive
            with pytest.raises(RuntimeError, match="the engine thread has ended"):
                world.replica.check_health()
            outcome = world.replica._submit(tools.request("b"), None)
            assert outcome[0] == "lost" and not world.replica._jobs
            world.replica.__del__()  # Serve may call it twice

    asyncio.run(run())


def test_weights_load_in_a_thread_and_their_errors_come_out(tools):
    """The event loop answers Serve's control calls meanwhile."""

    async def run():
        entered, release = threading.Event(), threading.Event()

        def slow(spec):
            entered.set()
            assert release.wait(5)
            raise EngineDead("no such model")

        replica = ModelReplica.__new__(ModelReplica)
        starting = asyncio.ensure_future(replica.__init__(tools.spec(), slow))
        await tools.until(entered.is_set)
        release.set()
        with pytest.raises(EngineDead, match="no such model"):
            await starting
        replica.__del__()  # of an object that never started

    asyncio.run(run())


def test_events_of_a_request_that_has_left_go_nowhere(tools):
    """Between a client's leaving and the engine's abort a step may end."""

    async def run():
        async with tools.world(step_s=0.001) as world:
            transport = await world.transport()
            for index in range(50):
                stream = transport.generate(tools.request("same id", 5000, seed=index))
                await stream.__anext__()
                await stream.aclose()
                await tools.until(lambda: not world.replica._jobs and not world.engine._live)
            await world.quiet()

    asyncio.run(run())


def test_slow_grammars_keep_nobody_waiting_whose_grammar_is_there(tools):
    """More of them than asyncio has threads."""

    async def run():
        async with tools.world() as world:
            transport, compiled = await world.transport(), threading.Event()
            slow, quick = of_regex("slow", "x"), of_regex("quick", "x")
            world.engine.prepare = lambda request: compiled.wait(20) if request.params.grammar is slow else None
            waiting = [asyncio.ensure_future(tools.read(transport, tools.request(f"s{i}", 2, grammar=slow))) for i in range(40)]
            await asyncio.sleep(0.05)
            assert len(await asyncio.wait_for(tools.read(transport, tools.request("q", 3, grammar=quick)), 5)) == 3
            compiled.set()
            assert [len(events) for events in await asyncio.gather(*waiting)] == [2] * 40
            await world.quiet()

    asyncio.run(run())


def test_a_compiler_that_is_kept_busy_by_others_is_no_fault_of_the_request(tools):
    async def run():
        async with tools.world() as world:

            def busy(request):
                raise RequestError("try again later", param="response_format", code=BUSY)

            world.engine.prepare = busy
            for kind in ("push", "handle"):
                transport = await world.transport(kind)
                with pytest.raises(Overloaded, match="try again later"):
                    await tools.read(transport, tools.request("a", grammar=of_regex("a", "x")))
            await world.quiet()

    asyncio.run(run())


def test_the_real_engine_serves_a_replica(tools, smollm2_dir):
    """load_engine, the loader of the shipped application: one greedy token from the real model."""
    from dataclasses import replace

    from model_core.engine.config import EngineConfig
    from model_core.weights.source import LocalModel

    config = EngineConfig(device="cpu", max_seqs=2, context_length=128, kv_cache_bytes=16 << 20, threads=1)
    spec = replace(tools.spec(), local=LocalModel(smollm2_dir, "SmolLM2", "fallback"), engine=config, name="served")

    async def run():
        replica = ModelReplica.__new__(ModelReplica)
        await replica.__init__(spec, load_engine)
        try:
            info = await replica.info()
            assert (info.model, info.source, info.context_length) == ("served", "fallback", 128)
            request = tools.request("a", 2, temperature=0.0)
            items = [item async for item in replica.stream(request)]
            from deployments.transport.wire import unpack_events

            events = [event for item in items for event in unpack_events("a", item)]
            assert sum(len(event.token_ids) for event in events) == 2 and events[-1].finish == "length"
            replica.check_health()
        finally:
            replica.__del__()
        assert not replica._engine.alive

    asyncio.run(run())
