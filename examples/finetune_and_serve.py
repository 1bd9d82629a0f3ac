"""Train a LoRA adapter on a text file, then serve it beside its base model.

Run: python examples/finetune_and_serve.py

Prints the training loss, which falls, then the same prompt completed by the base model and by the adapter. The text is this
repository's licence; `chameleon-jax finetune MODEL --text FILE --output DIRECTORY` does the same from the command line. The
first run compiles the programs, which takes longest.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints.finetune import FinetuneConfig, finetune, save
from chameleon_jax.checkpoints.loading import load_checkpoint

TEXT = Path(__file__).parents[1] / "LICENSE"
CONFIG = FinetuneConfig(rank=8, targets=("q_proj", "v_proj"), steps=20, batch_size=2, sequence_len=32, learning_rate=3e-3)


def main(model: str = "smollm2-135m") -> None:
    """Train, write the adapter as a PEFT directory, and complete a prompt with and without it."""
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 10 == 0:
            print(f"step {step}/{CONFIG.steps}  loss {statistics.mean(losses[-10:]):.3f} nats a token")

    settings: dict[str, Any] = dict(max_num_seqs=4, max_model_len=128, max_lora_rank=16, compile_programs="lazy")
    with LLM(model, **settings) as llm, tempfile.TemporaryDirectory() as directory:
        adapter = finetune(load_checkpoint(model), TEXT.read_text(encoding="utf-8"), CONFIG, report)
        save(adapter, directory, CONFIG, model, "float32")
        loras = [None, LoRARequest("licence", directory)]
        prompts = ["Subject to the terms and conditions of"] * 2
        for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), loras):
            print(f"{'with' if output.lora_request else 'without'} the adapter: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
