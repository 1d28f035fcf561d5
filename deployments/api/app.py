"""The Starlette application: every route of the HTTP API. Needs a token transport and a tokenizer, but no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from deployments.api import contract
from deployments.api.answer import Answer, Json, answer
from deployments.api.dialects import DialectRoutes
from deployments.api.edge import Edge, on_api_error, on_http_error
from deployments.api.guard import OPEN_PATHS, Cors, Guard
from deployments.api.incoming import read_body
from deployments.api.job import chat_job, completion_job
from deployments.api.keys import KeyRing
from deployments.api.metrics import CONTENT_TYPE, Metrics, render
from deployments.api.playground import is_wanted, playground
from deployments.api.service import Service
from deployments.api.texts import TextRoutes
from deployments.api.tracing import Tracer
from deployments.protocol.access import Access
from deployments.protocol.errors import ApiError, model_not_found
from deployments.protocol.limits import Limits
from deployments.protocol.requests import parse_chat, parse_completion
from deployments.protocol.responses import model_card
from deployments.tools.family import ToolParser
from deployments.transport.base import Transport
from model_core.tokenizer.tokenizer import Tokenizer


def create_app(
    transport: Transport,
    tokenizer: Tokenizer,
    limits: Limits,
    access: Access | None = None,
    *,
    tracer: Tracer | None = None,
    tag_responses: bool = True,
    tool_parser: ToolParser = "auto",
    everyone: Callable[[], Awaitable[list[Metrics]]] | None = None,
) -> Starlette:
    """The API over one served model. The app starts and closes the transport with its lifespan.

    access: keys and CORS, as Access.settled() gives it; None lets everybody in.
    tracer: gets a span of every generation request; closed with the app.
    tag_responses: send the header x-request-id (Ray Serve's proxies send it themselves).
    tool_parser: the form in which the model writes calls of tools.
    everyone: asks all replicas of this app, itself among them, for their metrics; None: there is this one.
    app.state.service is the Service; app.state.service.gate.drain() stops admission.
    """
    service = Service(transport, tokenizer, limits, version=_version(), tool_parser=tool_parser, everyone=everyone)
    endpoints, texts, dialects = Endpoints(service), TextRoutes(service), DialectRoutes(service)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/responses", dialects.responses, methods=["POST"]),
        Route("/v1/messages", dialects.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", dialects.count_tokens, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/chat/completions", endpoints.chat, methods=["POST"]),  # base URLs without /v1
        Route("/completions", endpoints.completions, methods=["POST"]),
        Route("/responses", dialects.responses, methods=["POST"]),
        Route("/models", endpoints.models),
        Route("/models/{id:path}", endpoints.model),
        Route("/v1/models/{id:path}", endpoints.model),
        Route("/v1/capabilities", endpoints.capabilities),
        Route("/tokenize", texts.tokenize, methods=["POST"]),
        Route("/detokenize", texts.detokenize, methods=["POST"]),
        Route("/tokenizer_info", texts.tokenizer_info),
        Route("/openapi.json", endpoints.openapi),
        Route("/docs", endpoints.docs),
        Route("/health", endpoints.health),
        Route("/ready", endpoints.ready),
        Route("/metrics", endpoints.metrics),
        Route("/version", endpoints.version),
        Route("/load", endpoints.load),
        Route("/debug/dispatch", endpoints.dispatch),
        Route("/", endpoints.index),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await transport.start()
        try:
            yield
        finally:
            service.gate.drain()
            await transport.close()
            service.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    paths = frozenset(route.path for route in routes)
    layers = [Middleware(Edge, metrics=service.metrics, routes=paths, tag_responses=tag_responses, tracer=tracer)]
    if access is not None:
        layers += _guards(access)
    app = Starlette(
        routes=routes,
        middleware=layers,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients: a 404 says what is wrong
    app.state.service = service
    return app


def _guards(access: Access) -> list[Middleware]:
    """CORS is the outer one: a page may read why it was refused, and its preflight carries no key."""
    layers = [Middleware(Cors, origins=access.cors_origins)] if access.cors_origins else []
    if access.needs_key:
        open_paths = OPEN_PATHS | {"/metrics"} if access.open_metrics else OPEN_PATHS
        layers.append(Middleware(Guard, keys=KeyRing(access), open_paths=open_paths))
    return layers


class Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Answer:
        body = await read_body(self._service, request)
        parsed, unknown = parse_chat(body, self._service.limits)
        self._service.metrics.unknown_fields += len(unknown)
        return answer(self._service, await chat_job(self._service, parsed, request.scope["mini_llm.record"]))

    async def completions(self, request: Request) -> Answer:
        body = await read_body(self._service, request)
        parsed, unknown = parse_completion(body, self._service.limits)
        self._service.metrics.unknown_fields += len(unknown)
        return answer(self._service, await completion_job(self._service, parsed, request.scope["mini_llm.record"]))

    async def models(self, request: Request) -> Response:
        info = await self._service.info()
        return Json({"object": "list", "data": [model_card(info, self._service.created)]})

    async def model(self, request: Request) -> Response:
        info = await self._service.info()
        name = request.path_params["id"]
        if name != info.model:
            raise model_not_found(name[:200], [info.model])
        return Json(model_card(info, self._service.created))

    async def health(self, request: Request) -> Response:
        return Json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        service = self._service
        if await service.is_ready():
            return Json({"status": "ready"})
        status = "draining" if service.gate.is_draining else "loading"
        return Json({"status": status}, status_code=503, headers={"retry-after": "2"})

    async def metrics(self, request: Request) -> Response:
        service = self._service
        stats = await service.stats()
        try:
            info = await service.info()
            model, pool_tokens = info.model, info.pool_tokens
        except ApiError:
            model, pool_tokens = "", 0
        text = render(model, pool_tokens, stats, await service.all_metrics())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        return Json({"version": self._service.version})

    async def load(self, request: Request) -> Response:
        """{server_load}, vLLM's name: sequences in work or waiting, of all HTTP replicas."""
        return Json({"server_load": sum(one.active for one in await self._service.all_metrics())})

    async def capabilities(self, request: Request) -> Response:
        return Json(contract.capabilities())

    async def openapi(self, request: Request) -> Response:
        return Json(contract.openapi(self._service.version))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(contract.page(self._service.version))

    async def dispatch(self, request: Request) -> Response:
        await self._service.info()
        return Json({"object": "list", "data": await self._service.dispatch_table()})

    async def index(self, request: Request) -> Response:
        if is_wanted(request):
            return playground()
        return Json(
            {
                "name": "Mini-LLM-Infra",
                "version": self._service.version,
                "generate": ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/messages"],
                "models": ["GET /v1/models", "GET /v1/models/{id}"],
                "tokens": ["POST /tokenize", "POST /detokenize", "GET /tokenizer_info"],
                "describe": ["GET /v1/capabilities", "GET /openapi.json", "GET /docs"],
                "operate": ["GET /health", "GET /ready", "GET /metrics", "GET /version", "GET /load", "GET /debug/dispatch"],
            },
            headers={"vary": "accept"},
        )


def _version() -> str:
    try:
        return package_version("mini-llm-infra")
    except PackageNotFoundError:
        return "0.0.0"
