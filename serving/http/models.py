"""`/v1/models` and the loading and unloading of adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from chameleon_jax.serving.http.access import KeyedRoute, require_access, require_admin, service_of
from chameleon_jax.serving.http.errors import translate_errors
from chameleon_jax.serving.http.strict_model import StrictModel
from chameleon_jax.serving.service.adapter_sources import MAX_SOURCE_LEN
from chameleon_jax.serving.service.service import MAX_NAME_LEN, Service

router = APIRouter(prefix="/v1", tags=["models"], route_class=KeyedRoute)

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LEN)]


class ModelCard(BaseModel):
    """Entry of the model list. `parent` is the base model's name, None for the base model itself."""

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


class LoadLora(StrictModel):
    """Adapter to load. `lora_path` is a path below one of the server's adapter directories, or a hub id that it allows."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_SOURCE_LEN)]
    pinned: bool | None = Field(
        default=None,
        description="Keep it on the device once there. Null keeps the name's setting, which for a new name is false.",
    )
    load_inplace: bool = Field(default=True, description="False refuses new content for an existing name.")


class LoadedLora(BaseModel):
    """Adapter now loaded. `already_loaded` says that the name had the same content before."""

    lora_name: str
    already_loaded: bool


class UnloadLora(StrictModel):
    lora_name: Name
    lora_int_id: int | None = Field(default=None, description="Accepted as in vLLM, and ignored.")


class UnloadedLora(BaseModel):
    lora_name: str


def _card(service: Service, name: str) -> ModelCard:
    parent = None if name in service.model_names else service.model_name
    length = service.llm.max_model_len
    return ModelCard(id=name, created=service.created, root=service.model_name, parent=parent, max_model_len=length)


@router.get("/models", dependencies=[Depends(require_access)])
async def list_models(request: Request) -> ModelList:
    service = service_of(request)
    with translate_errors():
        names = [*service.model_names, *await service.llm.list_loras()]
    return ModelList(data=[_card(service, name) for name in names])


@router.get("/models/{model:path}", dependencies=[Depends(require_access)])
async def get_model(request: Request, model: str) -> ModelCard:
    service = service_of(request)
    with translate_errors():
        if not model:  # in completion requests the empty name is the base model, but no model is called so
            raise KeyError("the model '' does not exist; see the list of models")
        service.lora_named(model)
    return _card(service, model)


@router.post("/load_lora_adapter", dependencies=[Depends(require_admin)])
async def load_lora_adapter(request: Request, body: LoadLora) -> LoadedLora:
    """Load an adapter, or give a name new content. Running requests keep the content they started with."""
    with translate_errors():
        already = await service_of(request).load_lora(body.lora_name, body.lora_path, body.pinned, body.load_inplace)
    return LoadedLora(lora_name=body.lora_name, already_loaded=already)


@router.post("/unload_lora_adapter", dependencies=[Depends(require_admin)])
async def unload_lora_adapter(request: Request, body: UnloadLora) -> UnloadedLora:
    """Unload an adapter. Requests that use it finish; then its memory is freed."""
    with translate_errors():
        await service_of(request).unload_lora(body.lora_name)
    return UnloadedLora(lora_name=body.lora_name)
