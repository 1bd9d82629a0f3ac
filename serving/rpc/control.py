"""`chameleon.v1.Control`."""

from __future__ import annotations

from grpc.aio import ServicerContext

import chameleon_jax
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.service.service import Service


class Control(stubs.ControlServicer):
    """Adapters, load and model of the server. Errors become status codes in `RpcInterceptor`."""

    def __init__(self, service: Service):
        self._service = service

    async def LoadLora(self, request: messages.LoadLoraRequest, context: ServicerContext) -> messages.LoadLoraResponse:
        pinned = request.pinned if request.HasField("pinned") else None
        load_inplace = request.load_inplace if request.HasField("load_inplace") else True
        already = await self._service.load_lora(request.lora_name, request.source_path, pinned, load_inplace)
        return messages.LoadLoraResponse(already_loaded=already)

    async def UnloadLora(self, request: messages.UnloadLoraRequest, context: ServicerContext) -> messages.UnloadLoraResponse:
        await self._service.unload_lora(request.lora_name)
        return messages.UnloadLoraResponse()

    async def ListLoras(self, request: messages.ListLorasRequest, context: ServicerContext) -> messages.ListLorasResponse:
        stats = await self._service.llm.stats(max_age=0)
        return messages.ListLorasResponse(
            loras=[
                messages.Lora(
                    lora_names=adapter.names,
                    content_hash=adapter.content_hash,
                    tier=adapter.tier,
                    rank=adapter.rank,
                    bytes=adapter.num_bytes,
                    references=adapter.references,
                    waiting=adapter.waiting,
                    pinned=adapter.pinned,
                    hits=adapter.uses,
                    loads=adapter.loads,
                )
                for adapter in stats.adapters
            ]
        )

    async def Abort(self, request: messages.AbortRequest, context: ServicerContext) -> messages.AbortResponse:
        return messages.AbortResponse(aborted=await self._service.llm.abort(request.request_id))

    async def GetLoad(self, request: messages.GetLoadRequest, context: ServicerContext) -> messages.GetLoadResponse:
        llm = self._service.llm
        if llm.error is not None:
            raise llm.error
        stats = await llm.stats()
        return messages.GetLoadResponse(
            running=stats.running,
            waiting=stats.waiting,
            queues=[
                messages.Queue(name=q.name, waiting=q.waiting, quota_pages=q.quota_pages, free_pages=q.free_pages)
                for q in stats.queues
            ],
            total_pages=stats.pool.total,
            free_pages=stats.pool.free,
            kv_pages=stats.pool.kv,
            adapter_pages=stats.pool.adapters,
            page_tokens=stats.page_tokens,
            resident_loras=[name for adapter in stats.adapters if adapter.tier == "resident" for name in adapter.names],
            draining=llm.draining,
        )

    async def GetModelInfo(
        self, request: messages.GetModelInfoRequest, context: ServicerContext
    ) -> messages.GetModelInfoResponse:
        llm = self._service.llm
        config = llm.engine.config
        return messages.GetModelInfoResponse(
            model_name=self._service.model_name,
            version=chameleon_jax.__version__,
            vocab_size=llm.model_config.vocab_size,
            max_model_len=llm.max_model_len,
            max_lora_rank=config.max_lora_rank if config.enable_lora else 0,
            dtype=llm.engine.dtype.name,
            system=config.system if isinstance(config.system, str) else "custom",
            num_layers=llm.model_config.num_layers,
            has_tokenizer=llm.tokenizer is not None,
        )
