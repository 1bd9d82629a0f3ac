"""Sizes of a full run and of a small one."""

from __future__ import annotations

import dataclasses

import jax

from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS, TARGETS, LlamaConfig
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for


@dataclasses.dataclass(frozen=True)
class Mix:
    """Adapters of a batch, one for each row, with `ranks` in turn."""

    name: str
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = TARGETS


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        grouped: A model whose query heads share key heads.
        rows: Rows of decode steps.
        contexts: Tokens of the sequences in decode steps.
        ranks: Ranks of adapters that are mixed.
        load_ranks: Ranks of adapters that are loaded.
        prompt_tokens: Tokens of a prefill step.
        mixed: Rows and prompt tokens of steps that both decode and have a prompt.
        max_tokens: Tokens of the longest sequence.
        scratch_bytes: Device memory that the pool leaves free.
        pool_bytes: Largest size of the pool. None takes all remaining memory.
        copy_bytes: Bytes of arrays that are read and written for bandwidth.
        matrix: Rows and columns of matrices that are multiplied for their rate.
        link_bytes: Bytes of pieces that are sent to the device.
        checks: Dtypes in which ops are checked, each for a model whose heads are "alike" or "grouped".
        variant_layers: Layers of the model that the section `variants` runs.
    """

    name: str
    config: LlamaConfig
    grouped: LlamaConfig
    dtype: str
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    ranks: tuple[int, ...]
    load_ranks: tuple[int, ...]
    prompt_tokens: int
    mixed: tuple[int, int]
    prefill_tile: int
    max_tokens: int
    scratch_bytes: int
    pool_bytes: int | None
    copy_bytes: int
    matrix: int
    link_bytes: tuple[int, ...]
    checks: tuple[tuple[str, str], ...]
    variant_layers: int

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """Mixes of the measured decode steps; the first has no adapters, and the others are compared with it."""
        return (
            Mix("base"),
            Mix("mixed ranks, q k v o", self.ranks, ATTENTION_TARGETS),
            Mix("rank 16, q k v o", (16,), ATTENTION_TARGETS),
            Mix("mixed ranks, all seven", self.ranks),
        )

    @property
    def max_rank(self) -> int:
        return max(*self.ranks, 16)


FULL = Scale(
    name="full",
    config=PRESETS["llama-7b"],
    grouped=PRESETS["llama-3-8b"],
    dtype="bfloat16",
    rows=(1, 8, 32, 64, 128),
    contexts=(512, 2048),
    ranks=(8, 16, 32, 64, 128),
    load_ranks=(8, 16, 32, 64, 128, 256),
    prompt_tokens=2048,
    mixed=(32, 512),
    prefill_tile=shapes_for("triton")["prefill_tile"],
    max_tokens=2048,
    scratch_bytes=6 << 30,
    pool_bytes=None,
    copy_bytes=2 << 30,
    matrix=8192,
    link_bytes=(16 << 20, 64 << 20, 256 << 20),
    checks=tuple((dtype, heads) for dtype in ("bfloat16", "float32") for heads in ("alike", "grouped")),
    variant_layers=8,
)
SMALL = Scale(
    name="small",
    config=dataclasses.replace(PRESETS["tiny"], num_kv_heads=4, num_layers=1),
    grouped=PRESETS["tiny"],
    dtype="float32",
    rows=(1, 4),
    contexts=(96,),
    ranks=(4, 8),
    load_ranks=(4, 16),
    prompt_tokens=64,
    mixed=(3, 32),
    prefill_tile=16,
    max_tokens=128,
    scratch_bytes=0,
    pool_bytes=2 << 20,
    copy_bytes=8 << 20,
    matrix=256,
    link_bytes=(1 << 20,),
    checks=(("float32", "grouped"),),
    variant_layers=1,
)
SCALES = {scale.name: scale for scale in (FULL, SMALL)}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


@dataclasses.dataclass(frozen=True)
class ChosenBuckets(StepBuckets):
    """Buckets of chosen sizes only.

    Attributes:
        rows: Rows of steps that only decode.
        steps: Tokens of steps with prompts. Each has the program that it has in serving.
    """

    rows: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def decode(self) -> tuple[int, ...]:
        return self.rows

    @property
    def prompts(self) -> tuple[int, ...]:
        sizes = super().prompts
        return tuple(sorted({next(size for size in sizes if size >= tokens) for tokens in self.steps}))
