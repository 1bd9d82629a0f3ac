"""Worker of the mixed benchmark: an engine of the checkout that PYTHONPATH names, asked for rounds in lines of JSON.

`mixed.py` starts it by its path, `python -P mixed_worker.py`, as the checkout may be of a commit without this file. So it
imports nothing of `benchmarks`. The first line of its input has the model, settings and adapters, each further line the
requests of a round and how many run at once. Each line is answered by one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import jax

import chameleon_jax
from chameleon_jax.config import EngineConfig
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's own event for a program that is compiled, or read from the compilation cache."""


def serve(engine: LLMEngine, requests: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    """Keep `concurrency` requests in the engine until none is left: as one ends, the next arrives.

    Returns:
        Times in seconds: the arrival, times of tokens and output of each request; time, prompt tokens and rows decoded of each
        step.
    """
    arrivals: list[float] = []
    times: list[list[float]] = [[] for _ in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    steps: list[tuple[float, int, int]] = []
    running: dict[str, int] = {}
    counters = engine.loop.counters
    while len(arrivals) < len(requests) or running:
        while len(arrivals) < len(requests) and len(running) < concurrency:
            request = requests[len(arrivals)]
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
            lora = None if request["adapter"] is None else LoRARequest(request["adapter"])
            running[engine.submit(request["prompt"], params, lora).request_id] = len(arrivals)
            arrivals.append(time.perf_counter())
        num_steps, prompt_tokens, decode_rows = counters.steps, counters.prefill_tokens, counters.decode_rows
        updated = engine.loop.step()
        now = time.perf_counter()
        if counters.steps > num_steps:
            steps.append((now, counters.prefill_tokens - prompt_tokens, counters.decode_rows - decode_rows))
        for served in updated:
            times[running[served.request_id]].append(now)
        for served in {served.request_id: served for served in updated if served.finish_reason is not None}.values():
            outputs[running.pop(served.request_id)] = served.output_token_ids
    return {"arrivals": arrivals, "times": times, "outputs": outputs, "steps": steps}


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print would break the lines of JSON
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = json.loads(sys.stdin.readline())
    engine = LLMEngine(start["model"], EngineConfig(**start["settings"]))
    for name, path in start["adapters"].items():
        engine.add_lora(name, path)
    replies.write(json.dumps({"package": chameleon_jax.__file__, "vocab_size": engine.model_config.vocab_size}) + "\n")
    for line in sys.stdin:
        begun = len(compiled)
        outcome = serve(engine, **json.loads(line))
        replies.write(json.dumps(outcome | {"compiled": len(compiled) - begun}) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
