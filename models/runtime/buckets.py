"""Shapes that are compiled: programs by size, and the parts of a step's one input array in each of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from chameleon_jax.models.config import ALL_TARGETS, ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.ops.batched_lora.plan import DECODE_WINDOW, LoraPlan, plan_shapes, window_tiles
from chameleon_jax.models.ops.sampling import SAMPLING_COLUMNS, SamplingMode
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes

if TYPE_CHECKING:
    from jaxtyping import Array, Int

DECODE_TILE = 1
"""Tokens of a tile in decode."""
PREFILL_TILE = 32
"""Tokens of a tile in prefill on a CPU."""
FROM_SLOT = -1
"""Token id that stands for the token last sampled for this slot."""


class Program(NamedTuple):
    """Key of a forward program.

    Attributes:
        tiles: Tiles of the step, padding included.
        tile_tokens: Tokens of a tile.
        adapted: Targets, from the first of ALL_TARGETS on, that are adapted. 0: a program without LoRA work.
    """

    tiles: int
    tile_tokens: int
    adapted: int

    @property
    def extras(self) -> bool:
        """Whether adapters may change embeddings, the output matrix, and the outputs of the layers' matrices themselves."""
        return self.adapted > len(TARGETS)


class Sampling(NamedTuple):
    """Key of a sampling program.

    Attributes:
        rows: Rows that it samples, padding included.
        mode: Kind of sampling that the rows need together.
        adjusted: Whether logits may change before tokens are drawn.
        adapted: Whether adapters' updates of the logits are added first.
    """

    rows: int
    mode: SamplingMode
    adjusted: bool
    adapted: bool


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Parts of a step's one input array, as views (host) or slices (device). Padding tiles come last and have count 0.

    The inputs are one array, as each array that is sent waits for the program before it. Eight arrays were predicted to cost an
    H100 1 to 2 % of a decode step.

    Attributes:
        tokens: Token ids, or FROM_SLOT.
        tiles: Position of the first token, tokens in the tile, slot, block table; `[tiles, 3 + width]`.
        sampling_rows: Parameters of the token behind each tile.
        lora: Adapters of the batch. None in a program without LoRA work.
    """

    tokens: Int[Any, " tokens"]
    tiles: Int[Any, "tiles 3+width"]
    sampling_rows: Int[Any, "tiles columns"]
    lora: LoraPlan | None = None


def shapes_for(backend: str) -> dict[str, Any]:
    """Look up the fields of `StepBuckets` in which backends differ.

    On a GPU larger tiles of prompts do more of their work on tensor cores. These multiply 16 rows at least, so that smaller
    windows of decode save nothing.
    """
    return {"prefill_tile": 64, "attention_alone": True, "decode_window": 16} if backend == "triton" else {}


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """List first, 2 first, 4 first ... up to last, which is always in the list."""
    sizes = list(itertools.takewhile(lambda n: n < last, (first << i for i in itertools.count())))
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class StepBuckets:
    """Shapes that are compiled.

    Attributes:
        max_num_seqs: Rows of the largest decode step.
        max_prefill_tokens: Tokens of the largest prefill step.
        table_width: Pages of the longest sequence.
        max_rank: Largest LoRA rank.
        max_adapter_pages: Pages of the largest adapter. 0: no adapters are served and no LoRA program is compiled.
        prefill_tile: Tokens of one sequence handled as a unit in prefill.
        attention_alone: Whether batches whose adapters keep to ATTENTION_TARGETS decode with programs of their own. On a GPU a
            launch costs time even where it finds nothing to do.
        decode_window: Rows that are multiplied with the same adapters in decode.
        extras: Whether there are programs for adapters with more than LoRA on the layers' matrices.
    """

    max_num_seqs: int
    max_prefill_tokens: int
    table_width: int
    max_rank: int
    max_adapter_pages: int
    prefill_tile: int = PREFILL_TILE
    attention_alone: bool = False
    decode_window: int = DECODE_WINDOW
    extras: bool = False

    @property
    def decode(self) -> tuple[int, ...]:
        """Rows of decode steps, ascending."""
        return powers_of_two(1, self.max_num_seqs)

    @property
    def prefill(self) -> tuple[int, ...]:
        """Tiles of prefill steps, ascending.

        From 8 on there are half steps too: padding is computed, and a prompt is bound by computing.
        """
        last = -(-self.max_prefill_tokens // self.prefill_tile)
        powers = powers_of_two(1, last)
        return tuple(sorted({*powers, *(n + n // 2 for n in powers if n >= 8 and n + n // 2 < last)}))

    @property
    def most_prefill_tokens(self) -> int:
        """Tokens of the largest prefill step, padding included."""
        return self.prefill[-1] * self.prefill_tile

    @property
    def prefill_shapes(self) -> PrefillShapes:
        """Tiles and sizes of prefill steps, as the scheduler knows them."""
        return PrefillShapes(self.prefill_tile, self.prefill)

    def sizes(self, tile_tokens: int) -> tuple[int, ...]:
        """List the buckets, in tiles, of steps of such tiles."""
        return self.decode if tile_tokens == DECODE_TILE else self.prefill

    def bucket(self, needed: int, tile_tokens: int) -> int:
        """Find the smallest bucket that holds `needed` tiles."""
        return next(n for n in self.sizes(tile_tokens) if n >= needed)

    def adapted(self, tile_tokens: int) -> tuple[int, ...]:
        """List the numbers of ALL_TARGETS that programs for such tiles adapt, a program for each number."""
        if not self.max_adapter_pages:
            return (0,)
        alone = self.attention_alone and tile_tokens == DECODE_TILE
        some = (0, len(ATTENTION_TARGETS), len(TARGETS)) if alone else (0, len(TARGETS))
        return (*some, len(ALL_TARGETS)) if self.extras else some

    def _parts(self, program: Program) -> dict[str, tuple[int, ...]]:
        """Compute the shapes of a packed step's parts by name, in order."""
        tiles, tile_tokens, adapted = program
        step = {
            "tokens": (tiles * tile_tokens,),
            "tiles": (tiles, 3 + self.table_width),
            "sampling_rows": (tiles, SAMPLING_COLUMNS),
        }
        if not adapted:
            return step
        return step | plan_shapes(
            tiles=tiles,
            tile_tokens=tile_tokens,
            max_rank=self.max_rank,
            max_pages=self.max_adapter_pages,
            num_targets=adapted,
            decode_window=self.decode_window,
        )

    def packed_size(self, program: Program) -> int:
        """Count the elements of a packed step."""
        return sum(math.prod(shape) for shape in self._parts(program).values())

    def view(self, packed: Int[Array | np.ndarray, " packed"], program: Program) -> StepInputs:
        """Take a packed step apart, into views of a NumPy array or slices of a JAX array."""
        parts: dict[str, Any] = {}
        begin = 0
        for name, shape in self._parts(program).items():
            end = begin + math.prod(shape)
            part = packed[begin:end] if isinstance(packed, np.ndarray) else jax.lax.slice(packed, (begin,), (end,))
            parts[name] = part.reshape(shape)
            begin = end
        step = {name: parts.pop(name) for name in ("tokens", "tiles", "sampling_rows")}
        lora = None
        if parts:
            lora = LoraPlan(**parts, window_tiles=window_tiles(program.tiles, program.tile_tokens, self.decode_window))
        return StepInputs(**step, lora=lora)

    @property
    def sample_rows(self) -> tuple[int, ...]:
        """Rows of the sampling programs: any number of tiles that a forward step may have."""
        return tuple(sorted({*self.decode, *self.prefill}))
