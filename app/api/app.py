"""The HTTP application: routes, the layer around them, errors in OpenAI's form.

Made from a `ServerContext` and nothing else: no settings are read, nothing is global.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from app.api.body import ClientDisconnected
from app.api.deps import ServerContext
from app.api.errors import MethodNotAllowed, kind_of
from app.api.hosts import HostLayer
from app.api.keys import KeyLayer
from app.api.middleware import RequestLayer
from app.api.openapi import add_schemas
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse
from app.api.routes import (
    chat,
    completions,
    docs,
    embeddings,
    engine,
    messages,
    metrics,
    models,
    page,
    responses,
    server,
    tokens,
)
from app.core.errors import HeadwaterError, InvalidRequest, NotFound

_EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "headwater-seed",
    "headwater-ignored",
    "headwater-resume",
    "headwater-resumed",
)


def create_app(context: ServerContext, *, root_path: str = "") -> FastAPI:
    """The application that serves `context`."""
    context.metrics.watch_engine(context.engine_snapshot)
    app = FastAPI(
        title="Headwater",
        version=context.version,
        root_path=root_path,
        servers=[{"url": root_path}] if root_path else None,
        lifespan=_lifespan_of(context),
        redirect_slashes=False,
        # Our own routes describe the API, from bundled files.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    modules = (chat, completions, messages, responses, embeddings, models, server, tokens, engine, page)
    routers = [module.routes(context) for module in modules]
    if not context.metrics_apart:
        routers.append(metrics.routes(context))
    if context.docs:
        routers.append(docs.routes(app))
    routes = _serve(app, routers)
    # The last one added is the outermost: a preflight carries no key, and every answer is logged.
    app.add_middleware(KeyLayer, keys=context.keys, metrics_keys=context.metrics_keys)
    if context.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    if context.allowed_hosts is not None:
        app.add_middleware(HostLayer, allowed_hosts=context.allowed_hosts)
    app.add_middleware(RequestLayer, routes=routes, metrics=context.metrics, tracer=context.tracer)
    add_schemas(app, unknown=context.limits.unknown_fields)
    return app


def create_metrics_app(context: ServerContext, *, allowed_hosts: tuple[str, ...] | None) -> FastAPI:
    """The application that serves `/metrics` alone, for an address of its own."""
    app = FastAPI(redirect_slashes=False, openapi_url=None, docs_url=None, redoc_url=None)
    routes = _serve(app, [metrics.routes(context)])
    app.add_middleware(KeyLayer, keys=context.keys, metrics_keys=context.metrics_keys)
    if allowed_hosts is not None:
        app.add_middleware(HostLayer, allowed_hosts=allowed_hosts)
    app.add_middleware(RequestLayer, routes=routes, metrics=context.metrics)
    return app


def _serve(app: FastAPI, routers: Sequence[APIRouter]) -> list[BaseRoute]:
    """Their routes, which are returned, and every error in our form."""
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes]
    app.add_exception_handler(HeadwaterError, _answer_error)
    app.add_exception_handler(HTTPException, partial(_answer_http_error, routes))
    app.add_exception_handler(ClientDisconnected, _answer_nobody)
    app.add_exception_handler(RequestValidationError, _answer_invalid_parameter)
    return routes


def _lifespan_of(context: ServerContext) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if not context.runs_engine:
            yield
            return
        await context.engine.start()
        try:
            yield
        finally:
            await context.engine.drain(context.drain_timeout)
            await context.engine.stop()
            if context.tracer is not None:
                await asyncio.to_thread(context.tracer.close)

    return lifespan


async def _answer_error(request: Request, error: Exception) -> Response:
    record = RequestRecord.of(request.scope)
    record.error_code = getattr(error, "code", None) or kind_of(error).code or kind_of(error).type
    return ErrorResponse(error, request.scope)


async def _answer_http_error(routes: Sequence[BaseRoute], request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _answer_error(request, _translate(request, error, routes))


async def _answer_invalid_parameter(request: Request, error: Exception) -> Response:
    """A query or path parameter of the wrong type; bodies are ours."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _answer_error(request, InvalidRequest(f"`{name}`: {first['msg']}.", param=name))


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response()


def _methods_of(scope: Scope, routes: Sequence[BaseRoute]) -> list[str]:
    """Every method that this path takes; the router itself tells those of the first route that fits."""
    fitting = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in fitting for method in getattr(route, "methods", None) or ()})


def _translate(request: Request, error: HTTPException, routes: Sequence[BaseRoute]) -> HeadwaterError:
    """Starlette's own refusals, in our classes."""
    where = f"{request.method} {request.url.path}"[:256]
    if error.status_code == kind_of(NotFound).status:
        return NotFound(f"There is no route {where}.")
    if error.status_code == kind_of(MethodNotAllowed).status:
        allow = ", ".join(_methods_of(request.scope, routes))
        return MethodNotAllowed(f"{where} is not answered; this route takes {allow}.", allow=allow)
    return InvalidRequest(str(error.detail))
