"""The HTTP application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import chameleon_jax
from chameleon_jax.serving.http import chat, completions, docs, health, models, tokenize
from chameleon_jax.serving.http.errors import ErrorBody, add_error_handlers
from chameleon_jax.serving.http.middleware import HeadAsGet, RequestMiddleware
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is invalid or not allowed; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer the request now."},
}


def make_app(service: Service) -> FastAPI:
    """Make OpenAI's API over a service. Operators' routers may be added to it."""
    app = FastAPI(
        title="chameleon-jax",
        version=chameleon_jax.__version__,
        summary="OpenAI's API over one base model and many LoRA adapters: an adapter's name is the `model`.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    add_error_handlers(app)
    for module in (models, completions, chat, tokenize, health):
        app.include_router(module.router, responses=ERRORS)
    app.include_router(docs.router)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestMiddleware, max_body_bytes=service.config.max_body_bytes)
    if service.config.allowed_origins:
        _allow_origins(app, service.config)
    return app


def _allow_origins(app: FastAPI, config: ServerConfig) -> None:
    """Let pages of other origins read answers, refusals by `RequestMiddleware` too, which is why this comes around it."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=("x-request-id", "retry-after"),
    )
