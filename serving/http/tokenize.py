"""`POST /tokenize` and `POST /detokenize`: a prompt as the model reads it, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, StrictBool, StrictInt

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.errors import ApiError, translate_errors
from chameleon_jax.serving.http.strict_model import StrictModel
from chameleon_jax.serving.http.template_fields import Messages, TemplateFields
from chameleon_jax.serving.service.service import MAX_NAME_LEN, Service

router = APIRouter(tags=["tokens"], route_class=KeyedRoute)

ModelName = Annotated[str, Field(max_length=MAX_NAME_LEN)]


class TokenizeRequest(TemplateFields):
    """Text or conversation to tokenize. The fields of chat templates apply to conversations."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = Field(
        default=None, description="Default: true for a prompt; false for messages, to which the chat template adds them."
    )
    return_token_strs: StrictBool = False

    async def token_ids(self, service: Service) -> list[int]:
        """Token ids of the prompt or the conversation. Raises ValueError, ApiError."""
        if (self.prompt is None) == (self.messages is None):
            given = "missing" if self.prompt is None else "given together with messages"
            raise ApiError(400, f"prompt is {given}; allowed: either prompt or messages", param="prompt")
        self.check_template_fields()
        if self.prompt is not None:
            return await service.llm.prompts.read(self.prompt, self.add_special_tokens is not False)
        return await self.chat_tokens(service, self.messages or (), add_special_tokens=bool(self.add_special_tokens))


class TokenizeResponse(BaseModel):
    """Tokens of a prompt. `token_strs` are their names in the vocabulary, where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    model: ModelName | None = None
    tokens: Annotated[list[StrictInt], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    prompt: str


@router.post("/tokenize", dependencies=[Depends(require_access)])
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """Turn a prompt, or a conversation formatted by the chat template, into token ids."""
    service = service_of(request)
    with translate_errors():
        await service.check_model(body.model)
        tokens = await body.token_ids(service)
    strings = [_tokenizer(service).token(i) for i in tokens] if body.return_token_strs else None
    return TokenizeResponse(count=len(tokens), max_model_len=service.llm.max_model_len, tokens=tokens, token_strs=strings)


@router.post("/detokenize", dependencies=[Depends(require_access)])
async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
    """Turn token ids into the text that they stand for, special tokens included."""
    service = service_of(request)
    with translate_errors():
        await service.check_model(body.model)
        tokenizer, vocab = _tokenizer(service), service.llm.model_config.vocab_size
        for i, token in enumerate(body.tokens):
            if not 0 <= token < vocab:
                raise ApiError(400, f"tokens.{i} is {token}; allowed: 0 to {vocab - 1}", param=f"tokens.{i}")
    return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False))


def _tokenizer(service: Service) -> Tokenizer:
    if service.llm.tokenizer is None:
        raise ValueError("tokens: the model has no tokenizer (load_format='dummy')")
    return service.llm.tokenizer
