"""Run one pass of the comparison through transformers + peft: `python run_transformers.py WORK OUT`, started by compare.py.

Batches are static, as `generate` has them: `concurrency` requests at a time, padded on the left, adapters mixed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


class FirstToken(LogitsProcessor):
    """Record of the time at which the first token is chosen."""

    at: float | None = None

    def __call__(self, input_ids, scores):
        self.at = self.at or time.perf_counter()
        return scores


def serve(model, requests: list[dict], concurrency: int) -> dict:
    """Serve requests in batches; times are seconds, and a batch's requests are sent at its start."""
    ttft, tokens = [], []
    begin = time.perf_counter()
    for first in range(0, len(requests), concurrency):
        batch = requests[first : first + concurrency]
        length = max(len(r["prompt_token_ids"]) for r in batch)
        pad = [length - len(r["prompt_token_ids"]) for r in batch]
        ids = torch.tensor([[0] * n + r["prompt_token_ids"] for n, r in zip(pad, batch)])
        mask = torch.tensor([[0] * n + [1] * (length - n) for n in pad])
        arguments = {"input_ids": ids, "attention_mask": mask}
        if isinstance(model, PeftModel):
            arguments["adapter_names"] = [r["adapter"] or "__base__" for r in batch]
        new = batch[0]["max_tokens"]
        sent = time.perf_counter()
        clock = FirstToken()
        with torch.inference_mode():
            output = model.generate(
                **arguments,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([clock]),
            )
        assert clock.at is not None
        ttft += [clock.at - sent] * len(batch)
        tokens += output[:, length:].tolist()
    return {"seconds": time.perf_counter() - begin, "ttft": ttft, "tokens": tokens}


def main() -> None:
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    workloads = json.loads((work / "workloads.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None
    results = {}
    for workload in sorted(workloads, key=lambda w: any(r["adapter"] for r in w["requests"])):
        model = base
        names = sorted({r["adapter"] for r in workload["requests"]} - {None})
        if names:
            model = PeftModel.from_pretrained(base, work / "adapters" / names[0], adapter_name=names[0])
            for name in names[1:]:
                model.load_adapter(work / "adapters" / name, adapter_name=name)
        serve(model, [{**r, "max_tokens": 2} for r in workload["requests"]], workload["concurrency"])
        results[workload["name"]] = serve(model, workload["requests"], workload["concurrency"])
        if names:
            model.unload()
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
