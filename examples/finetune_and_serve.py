"""Train a LoRA adapter on a text file, then serve it beside its base model.

Run: python examples/finetune_and_serve.py

Prints the training loss, which falls, then the same prompt completed by the base model and by the adapter. The text is this
repository's licence; `chameleon-jax finetune MODEL --text FILE --output DIRECTORY` does the same from the command line.
"""

import tempfile
from pathlib import Path

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints.finetune import FinetuneConfig, finetune, save
from chameleon_jax.checkpoints.loading import load_checkpoint

TEXT = Path(__file__).parents[1] / "LICENSE"
CONFIG = FinetuneConfig(rank=8, targets=("q_proj", "v_proj"), steps=20, batch_size=1, sequence_len=32, learning_rate=3e-3)


def report(step: int, loss: float) -> None:
    """Print every fifth step's loss, in nats a token."""
    if step % 5 == 0:
        print(f"step {step}/{CONFIG.steps}  loss {loss:.3f}")


def main(model: str = "smollm2-135m") -> None:
    """Train, write the adapter as a PEFT directory, and complete a prompt with and without it."""
    with tempfile.TemporaryDirectory() as directory:
        adapter = finetune(load_checkpoint(model), TEXT.read_text(encoding="utf-8"), CONFIG, report)
        save(adapter, directory, CONFIG, model, "float32")
        params = SamplingParams(temperature=0, max_tokens=24)
        with LLM(model, max_num_seqs=4, max_model_len=128, max_num_batched_tokens=32, max_lora_rank=16) as llm:
            lora = [None, LoRARequest("licence", directory)]
            for output in llm.generate(["Subject to the terms and conditions of"] * 2, params, lora_request=lora):
                print(f"{'with' if output.lora_request else 'without'} the adapter: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
