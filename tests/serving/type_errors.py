"""Settings that a type checker refuses. `make check` fails where one is accepted: its comment is then unused."""

from chameleon_jax import LLM, AsyncLLM


def wrong_settings() -> None:
    LLM("tiny", max_num_seq=8)  # type: ignore[call-arg]
    LLM("tiny", max_num_seqs="8")  # type: ignore[arg-type]
    AsyncLLM("tiny", enable_lora="no")  # type: ignore[arg-type]
    AsyncLLM("tiny", max_loras=8)  # type: ignore[call-arg]


def right_settings() -> None:
    LLM("tiny", max_num_seqs=8, num_pages=None, ttft_slo=5, system="fifo")
    AsyncLLM("tiny", max_lora_loads=1, max_model_len=128)
