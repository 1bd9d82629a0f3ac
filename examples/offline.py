"""Complete prompts with a base model and two adapters in one batch.

Run: python examples/offline.py

Prints one line for each request: the adapter, the completion, and the reason for its end. The base model and both adapters run
in the same steps.
"""

from pathlib import Path
from typing import Any

from chameleon_jax import LLM, LoRARequest, SamplingParams

ADAPTERS = Path(__file__).parents[1] / "benchmarks" / "demo_adapters"
PROMPT = "The heart of man is"


def main(model: str = "smollm2-135m", adapters: Path = ADAPTERS) -> None:
    """Complete one prompt three times: with the base model, with "bard" and with "bible"."""
    bard = LoRARequest("bard", str(adapters / "shakespeare"))
    bible = LoRARequest("bible", str(adapters / "king-james"))
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=24)
    # compile_programs="lazy" suits a short run: it compiles only the programs that these steps need
    settings: dict[str, Any] = dict(
        max_num_seqs=4, max_model_len=128, max_num_batched_tokens=32, max_lora_rank=16, compile_programs="lazy"
    )
    with LLM(model, **settings) as llm:
        for output in llm.generate([PROMPT] * 3, params, lora_request=[None, bard, bible]):
            name = output.lora_request.name if output.lora_request else "base model"
            completion = output.outputs[0]
            print(f"{name:10s} {PROMPT}{completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":
    main()
