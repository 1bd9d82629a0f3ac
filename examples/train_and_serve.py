"""Train an adapter and serve it in one process: each step's weights go from the trainer's memory to the next request.

Run: python examples/train_and_serve.py

Prints the loss and the completion of a prompt after some of the steps, as a reinforcement-learning loop would sample from its
newest policy. A request that runs keeps the weights that it started with. The text is this repository's licence. The first run
compiles the programs, which takes longest.
"""

import asyncio
from pathlib import Path
from typing import Any

from chameleon_jax import AsyncLLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints.finetune import FinetuneConfig, training_steps
from chameleon_jax.checkpoints.loading import load_checkpoint

TEXT = Path(__file__).parents[1] / "LICENSE"
CONFIG = FinetuneConfig(rank=8, targets=("q_proj", "v_proj"), steps=20, batch_size=2, sequence_len=32, learning_rate=3e-3)
PARAMS = SamplingParams(temperature=0, max_tokens=16)


async def complete(llm: AsyncLLM, prompt: str) -> str:
    """Complete a prompt with the weights that "policy" has now."""
    text = ""
    async for output in llm.generate(prompt, PARAMS, LoRARequest("policy")):
        text = output.outputs[0].text
    return text


async def train_and_serve(model: str) -> None:
    """Train with Optax, give "policy" the weights of each step, and sample from it after every fifth."""
    settings: dict[str, Any] = dict(max_num_seqs=4, max_model_len=128, max_lora_rank=16, compile_programs="lazy")
    async with AsyncLLM(model, **settings) as llm:
        for step in training_steps(load_checkpoint(model), TEXT.read_text(encoding="utf-8"), CONFIG):
            await llm.add_lora("policy", weights=step.adapter, peft_config={"lora_alpha": CONFIG.alpha})
            if step.number % 5 == 0:
                text = await complete(llm, "Subject to the terms and conditions of")
                print(f"step {step.number}/{CONFIG.steps}  loss {step.loss:.3f} nats a token  {text!r}")


def main(model: str = "smollm2-135m") -> None:
    """Run the trainer and the server on one asyncio loop."""
    asyncio.run(train_and_serve(model))


if __name__ == "__main__":
    main()
