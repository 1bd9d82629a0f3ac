"""The base model and its adapters by name: listed, loaded and unloaded."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from chameleon_jax.serving.http.access import KeyedRoute, require_access, require_admin, service_of
from chameleon_jax.serving.http.body import Body
from chameleon_jax.serving.http.errors import answered
from chameleon_jax.serving.service.service import Service

router = APIRouter(prefix="/v1", tags=["models"], route_class=KeyedRoute)

Name = Annotated[str, Field(min_length=1, max_length=256)]


class ModelCard(BaseModel):
    """`parent` is the base model's name, None for the base model itself."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chameleon-jax"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadLora(Body):
    """`lora_path`: below one of the server's adapter directories, or a hub id that it allows."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    pinned: bool | None = Field(default=None, description="Never leaves the device; null: as before, a new name is not pinned.")
    load_inplace: bool = Field(default=True, description="False refuses other content for a name that exists.")


class LoadedLora(BaseModel):
    """`already_loaded`: the name had that very content before."""

    lora_name: str
    already_loaded: bool


class UnloadLora(Body):
    lora_name: Name
    lora_int_id: int | None = Field(default=None, description="As in vLLM; not used.")


class UnloadedLora(BaseModel):
    lora_name: str


def _card(service: Service, name: str) -> ModelCard:
    parent = None if name == service.model_name else service.model_name
    length = service.llm.max_model_len
    return ModelCard(id=name, created=service.created, root=service.model_name, parent=parent, max_model_len=length)


@router.get("/models", dependencies=[Depends(require_access)])
async def list_models(request: Request) -> ModelList:
    service = service_of(request)
    with answered():
        names = [service.model_name, *await service.llm.list_loras()]
    return ModelList(data=[_card(service, name) for name in names])


@router.get("/models/{model:path}", dependencies=[Depends(require_access)])
async def get_model(request: Request, model: str) -> ModelCard:
    service = service_of(request)
    with answered():
        if not model:  # in requests that is the base model, but it is nobody's name
            raise KeyError("the model '' does not exist; see the list of models")
        service.lora_named(model)
    return _card(service, model)


@router.post("/load_lora_adapter", dependencies=[Depends(require_admin)])
async def load_lora_adapter(request: Request, body: LoadLora) -> LoadedLora:
    """Loads an adapter, or gives a name new content; requests that run keep what they began with."""
    with answered():
        already = await service_of(request).load_lora(body.lora_name, body.lora_path, body.pinned, body.load_inplace)
    return LoadedLora(lora_name=body.lora_name, already_loaded=already)


@router.post("/unload_lora_adapter", dependencies=[Depends(require_admin)])
async def unload_lora_adapter(request: Request, body: UnloadLora) -> UnloadedLora:
    """Requests that use it finish; then its memory is free."""
    with answered():
        await service_of(request).unload_lora(body.lora_name)
    return UnloadedLora(lora_name=body.lora_name)
