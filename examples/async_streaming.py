"""Stream several requests at once from one asyncio program, and abort one of them.

Run: python examples/async_streaming.py

Prints the text of each request as it grows, then the reason for its end: "length" for the first two, and nothing more for the
third, whose reader leaves after 8 tokens; leaving the iteration aborts the request and frees its pages.
"""

import asyncio
from pathlib import Path

from chameleon_jax import AsyncLLM, LoRARequest, SamplingParams

ADAPTERS = Path(__file__).parents[1] / "benchmarks" / "demo_adapters"


async def read(llm: AsyncLLM, prompt: str, adapter: str | None, limit: int) -> None:
    """Print a request's new text after each step, and stop reading after `limit` tokens."""
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=16)
    shown = 0
    async for output in llm.generate(prompt, params, LoRARequest(adapter) if adapter else None):
        completion = output.outputs[0]
        print(f"{adapter or 'base model':12s} {completion.text[shown:]!r}", completion.finish_reason or "")
        shown = len(completion.text)
        if len(completion.token_ids) >= limit:
            break


async def serve(model: str, adapters: Path) -> None:
    """Load one adapter, then answer three requests at once."""
    async with AsyncLLM(model, max_num_seqs=4, max_model_len=128, max_lora_rank=16, compile_programs="lazy") as llm:
        await llm.add_lora("shakespeare", adapters / "shakespeare")
        await asyncio.gather(
            read(llm, "The heart of man is", None, 16),
            read(llm, "The heart of man is", "shakespeare", 16),
            read(llm, "My lord, I bring you news of", "shakespeare", 8),
        )
        print("finished or aborted:", (await llm.stats(max_age=0)).running == 0)


def main(model: str = "smollm2-135m", adapters: Path = ADAPTERS) -> None:
    """Run the program in a loop of its own."""
    asyncio.run(serve(model, adapters))


if __name__ == "__main__":
    main()
