"""The routes."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib import resources

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from mixtral_jax.errors import InputError
from mixtral_jax.inference.engine import Engine
from mixtral_jax.serving.body import read_body
from mixtral_jax.serving.chat import ChatJob
from mixtral_jax.serving.completions import CompletionJob
from mixtral_jax.serving.errors import ApiError, from_input
from mixtral_jax.serving.generation import answer
from mixtral_jax.serving.guard import Guard
from mixtral_jax.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mixtral_jax.serving.service import Service
from mixtral_jax.serving.settings import Settings
from mixtral_jax.text.chat import encode_chat
from mixtral_jax.text.tokenizer import Tokenizer


def create_app(engine: Engine, tokenizer: Tokenizer | None, vocab_size: int, settings: Settings) -> Guard:
    """The server as an ASGI application; the engine is stepped while it runs.

    Args:
      engine: warmed up, or the first requests wait for it.
      tokenizer: the model's.
      vocab_size: the model's ids, at least the tokenizer's.

    Raises:
      InputError: there is no tokenizer, or the limits don't fit each other.
    """
    service = Service(engine, tokenizer, vocab_size, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    guard = Guard(app, service)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(InputError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _fail)
    _add_texts(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_others(app, service, guard)
    return guard


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, InputError):
        return from_input(error).response()
    if isinstance(error, HTTPException):
        where = f"{request.method} {request.url.path[:200]}"
        error = ApiError(error.status_code, f"{where}: {error.detail.lower()}", headers=error.headers)
    assert isinstance(error, ApiError)
    return error.response()


async def _fail(request: Request, error: Exception) -> Response:
    return ApiError(500, "something went wrong; the server's log says what", code="internal_error").response()


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, service.settings)
        return await answer(service, await asyncio.to_thread(CompletionJob, service, body), request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatRequest, service.settings)
        return await answer(service, await asyncio.to_thread(ChatJob, service, body), request)


def _add_models(app: FastAPI, service: Service) -> None:
    described = {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "mixtral-jax",
        "max_model_len": service.max_length,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(described)


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer, chosen = service.tokenizer, service.settings.chat_format

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest, service.settings)
        service.check_model(body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(encode_chat, body.messages, tokenizer, chosen, body.tools)
        else:
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", body.add_special_tokens)
        return JSONResponse({"count": len(ids), "max_model_len": service.max_length, "tokens": ids})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest, service.settings)
        service.check_model(body.model)
        wrong = next((token for token in body.tokens if not 0 <= token < tokenizer.vocab_size), None)
        if wrong is not None:
            raise InputError("tokens", wrong, f"token ids go from 0 to {tokenizer.vocab_size - 1}")
        return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})


def _add_others(app: FastAPI, service: Service, guard: Guard) -> None:
    page = resources.files("mixtral_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = page_headers(page)

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        if service.worker.failed is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "draining"}, 503) if guard.draining else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def page_headers(page: str) -> dict[str, str]:
    """What lets the page's own script and style run, each by its digest, and talk to its own server; nothing else."""

    def digests(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in parts)

    policy = (
        "default-src 'none'",
        f"script-src {digests('script')}",
        f"style-src {digests('style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
