"""The HTTP deployment: Ray Serve runs the API's Starlette app in its replicas; text work happens here alone."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from deployments.api.app import create_app
from deployments.api.metrics import Metrics
from deployments.api.tracing import open_tracer
from deployments.broadcast import answers_of, rank
from deployments.grpc_batch import finish_batches
from deployments.logs import log_to_stderr
from deployments.transport.base import Transport
from model_core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from deployments.settings import AppArgs
    from model_core.weights.source import LocalModel


# More objects than before, and the garbage collector looks for cycles. Requests leave none of ours, but those in flight have
# 180 each: with Python's 700 looking through them, again and again, takes a tenth of this process' CPU time.
_MORE_OBJECTS = 50_000


# Everything about limits and queues is the app's own (api/admission.py, api/supervise.py): Serve would answer in bare
# text and cut streams. So Serve's limits are out of the way here.
@serve.deployment(max_ongoing_requests=4096, max_queued_requests=-1, graceful_shutdown_timeout_s=120)
@serve.ingress()
class Api:
    """model: handle of the model deployment. Serve calls __serve_build_asgi_app__ once, after the constructor."""

    def __init__(self, model: DeploymentHandle, args: AppArgs, local_model: LocalModel) -> None:
        finish_batches()
        self._model = model
        self._args = args
        me = serve.get_replica_context()
        self._replicas = serve.get_deployment_handle(me.deployment, me.app_name)
        self._tokenizer = load_tokenizer(local_model.path)
        log_to_stderr("%(message)s")  # access records are JSON already

    def __serve_build_asgi_app__(self) -> Starlette:
        transport = open_transport(self._args.transport, self._model)
        # Serve's proxies put x-request-id on every response themselves; twice, clients would read "a, a"
        args = self._args
        tracer = None if args.tracing is None else open_tracer(args.tracing)
        app = create_app(transport, self._tokenizer, args.limits, args.access, tracer=tracer, tag_responses=False,
                         tool_parser=args.tool_parser, everyone=self._everyone)  # fmt: skip
        self._service = app.state.service
        gc.freeze()  # what is here by now stays: a collection that looks through it takes 0.1 s
        gc.set_threshold(_MORE_OBJECTS)
        return app

    async def metrics(self) -> Metrics:
        """What this replica has counted."""
        own = self._service.own_metrics()
        own.replica = rank()
        return own

    async def _everyone(self) -> list[Metrics]:
        """The same of all replicas that answer in time."""
        return await answers_of(self._replicas, "metrics", Metrics)

    async def stop(self, grace_s: float) -> None:
        """The launcher's farewell: Serve kills its proxy first, and with it every stream."""
        await self._service.stop(grace_s)


def open_transport(kind: str, model: DeploymentHandle) -> Transport:
    """kind: "push" or "handle", as in serve_config.yaml."""
    if kind == "handle":
        from deployments.transport.handle import HandleTransport

        return HandleTransport(model)
    from deployments.transport.push import PushTransport

    return PushTransport(model)

