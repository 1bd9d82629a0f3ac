"""Shapes that are compiled: programs by size, and the parts of a step's one input array in each of them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from chameleon_jax.models.config import ALL_TARGETS, ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.ops.batched_lora.plan import DECODE_WINDOW, PROMPT_WINDOW, LoraPlan, plan_shapes
from chameleon_jax.models.ops.sampling import SAMPLING_COLUMNS, SamplingMode
from chameleon_jax.scheduler.step_shapes import StepShapes

if TYPE_CHECKING:
    from jaxtyping import Array, Int

PREFILL_TILE = 32
"""Tokens of a tile of a prompt on a CPU."""
ROUNDED_TO = 8
"""Number that divides the tokens of the largest step, as matrix products prefer."""
TILE_COLUMNS = 4
"""Columns of a step's table of tiles ahead of block tables."""
FROM_SLOT = -1
"""Token id that stands for the token last sampled for this slot."""


class Program(NamedTuple):
    """Key of a forward program: room for a step of these sizes.

    Attributes:
        tokens: Tokens of the step, padding included.
        rows: Sequences that decode, a token each: the first ones.
        tiles: Tiles of prompts. 0: a program for decoding alone, of as many tokens as rows.
        adapted: Targets, from the first of ALL_TARGETS on, that are adapted. 0: a program without LoRA work.
    """

    tokens: int
    rows: int
    tiles: int
    adapted: int

    @property
    def extras(self) -> bool:
        """Whether adapters may change embeddings, the output matrix, and the outputs of the layers' matrices themselves."""
        return self.adapted > len(TARGETS)

    def can_run(self, step: Program) -> bool:
        """Tell whether the program has room for everything in a step."""
        return (
            self.tokens >= step.tokens and self.rows >= step.rows and self.tiles >= step.tiles and self.adapted >= step.adapted
        )


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
    """Parts of a step's one input array, as views (host) or slices (device).

    The rows that decode come first, a token each, then the prompts' chunks, then padding. Attention takes the prompts in tiles,
    a chunk's last one partly filled.

    The inputs are one array, as each array that is sent waits for the program before it. Eight arrays were predicted to cost an
    H100 1 to 2 % of a decode step.

    Attributes:
        tokens: Token ids, or FROM_SLOT.
        tiles: Of each row that decodes, then of each tile: its first token, that token's position, its tokens, slot, block
            table; `[rows + tiles, TILE_COLUMNS + width]`. Padding has no tokens.
        places: Place of each token: its row, or the number of rows + tile * tile_tokens + place in the tile; -1 for padding.
            None in a program for decoding alone, where it is the token's number.
        sampled: Token behind which each sampling row samples.
        sampling_rows: Parameters of the sampling rows.
        decode_lora: Adapters of the rows that decode. None in a program without any or without LoRA work.
        prompt_lora: Adapters of the prompts, likewise.
        sampled_lora: Adapters of the sampling rows, where they may change logits and the rows are not those that decode.
    """

    tokens: Int[Any, " tokens"]
    tiles: Int[Any, "rows_and_tiles columns+width"]
    places: Int[Any, " tokens"] | None
    sampled: Int[Any, " sequences"]
    sampling_rows: Int[Any, "sequences columns"]
    decode_lora: LoraPlan | None = None
    prompt_lora: LoraPlan | None = None
    sampled_lora: LoraPlan | None = None


def shapes_for(backend: str) -> dict[str, Any]:
    """Look up the fields of `StepBuckets` in which backends differ.

    On a GPU larger tiles of prompts do more of their work on tensor cores. These multiply 16 rows at least, so that smaller
    windows of decode save nothing. A launch costs time even where it finds nothing to do: programs have the work of their
    steps and no more.
    """
    return {"prefill_tile": 64, "few_launches": True, "decode_window": 16} if backend == "triton" else {}


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """List first, 2 first, 4 first ... up to last, which is always in the list."""
    sizes = list(itertools.takewhile(lambda n: n < last, (first << i for i in itertools.count())))
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class StepBuckets:
    """Shapes that are compiled.

    Attributes:
        max_num_seqs: Most sequences of a step.
        max_prefill_tokens: Most tokens of prompts in a step.
        table_width: Pages of the longest sequence.
        max_rank: Largest LoRA rank.
        max_adapter_pages: Pages of the largest adapter. 0: no adapters are served and no LoRA program is compiled.
        prefill_tile: Tokens of one sequence handled as a unit by attention to prompts.
        few_launches: Whether batches whose adapters keep to ATTENTION_TARGETS decode with programs of their own, and prompts
            run with programs of their own where nothing decodes.
        decode_window: Rows that are multiplied with the same adapters in decode.
        extras: Whether there are programs for adapters with more than LoRA on the layers' matrices.
    """

    max_num_seqs: int
    max_prefill_tokens: int
    table_width: int
    max_rank: int
    max_adapter_pages: int
    prefill_tile: int = PREFILL_TILE
    few_launches: bool = False
    decode_window: int = DECODE_WINDOW
    extras: bool = False

    @property
    def decode(self) -> tuple[int, ...]:
        """Rows of steps that only decode, ascending."""
        return powers_of_two(1, self.max_num_seqs)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Tokens of steps with prompts, ascending.

        From 8 tiles on there are half steps too: padding is computed, and a prompt is bound by computing. The last size has
        room for every prompt token, and for every row that there can be beside a prompt.
        """
        most = max(self.max_prefill_tokens, self.prefill_tile)
        powers = powers_of_two(self.prefill_tile, most + -(-(self.max_num_seqs - 1) // ROUNDED_TO) * ROUNDED_TO)
        halves = {n + n // 2 for n in powers if n >= 8 * self.prefill_tile and n + n // 2 < most}
        return tuple(sorted({*powers, *halves, most}))

    @functools.cached_property
    def step_shapes(self) -> StepShapes:
        """Sizes of steps with prompts, as the scheduler knows them."""
        return StepShapes(self.prompts, self.prefill_tile)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step, in whole tiles."""
        return self.step_shapes.tiles(self.prompts[-1]) * self.prefill_tile

    @functools.cached_property
    def programs(self) -> tuple[Program, ...]:
        """List the forward programs, the smallest first."""
        return tuple(sorted({program for kind in (self._decodes(), self._with_prompts()) for program in kind}))

    def _decodes(self) -> Iterable[Program]:
        for rows, adapted in itertools.product(self.decode, self.adapted(alone=self.few_launches)):
            yield Program(rows, rows, 0, adapted)

    def _with_prompts(self) -> Iterable[Program]:
        """List programs with prompts.

        Where programs have no more work than their steps, a step without rows that decode has programs of its own, and one with
        such rows has only programs that adapt the layers' matrices, so that there are not many more.
        """
        all_adapted = self.adapted(alone=False)
        for tokens in self.prompts:
            tiles = self.step_shapes.room(tokens)
            rows = min(self.max_num_seqs, tokens)
            if not self.few_launches:
                yield from (Program(tokens, rows, tiles, adapted) for adapted in all_adapted)
                continue
            yield from (Program(tokens, rows, tiles, adapted) for adapted in all_adapted[1:] or all_adapted)
            if tokens <= max(self.max_prefill_tokens, self.prefill_tile):
                yield from (Program(tokens, 0, tiles, adapted) for adapted in all_adapted)

    def choose(self, step: Program) -> Program:
        """Choose the smallest program for a step of these sizes."""
        first = bisect.bisect_left(self.programs, step.tokens, key=lambda program: program.tokens)
        for program in self.programs[first:]:
            if program.can_run(step) and bool(program.tiles) == bool(step.tiles):  # decoding alone has programs of its own
                return program
        raise ValueError(f"no program has room for {step}")

    def adapted(self, alone: bool) -> tuple[int, ...]:
        """List the numbers of ALL_TARGETS that programs adapt; `alone` with ATTENTION_TARGETS alone among them."""
        if not self.max_adapter_pages:
            return (0,)
        some = (0, len(ATTENTION_TARGETS), len(TARGETS)) if alone else (0, len(TARGETS))
        return (*some, len(ALL_TARGETS)) if self.extras else some

    def sampled_rows(self, program: Program) -> int:
        """Count the rows that a program's steps may sample, padding included; extras update the logits of as many."""
        most = min(self.max_num_seqs, program.rows + program.tiles)
        return next(rows for rows in self.decode if rows >= most)

    def lora_plans(self, program: Program) -> dict[str, dict[str, int]]:
        """List a program's plans by their names in `StepInputs`, with the arguments of `plan_shapes` that are its own."""
        tokens, rows, tiles, adapted = program
        plans = {}
        if adapted and rows:
            plans["decode_lora"] = {"tokens": rows, "runs": rows, "window_tokens": min(rows, self.decode_window)}
        if adapted and tiles:
            plans["prompt_lora"] = {"tokens": tokens, "runs": tiles, "window_tokens": min(tokens, PROMPT_WINDOW)}
        if program.extras and tiles:
            updated = self.sampled_rows(program)
            plans["sampled_lora"] = {"tokens": updated, "runs": updated, "window_tokens": min(updated, self.decode_window)}
        return plans

    @functools.cache  # noqa: B019  # buckets live as long as their programs
    def _parts(self, program: Program) -> dict[tuple[str, str], tuple[int, ...]]:
        """Compute the shapes of a packed step's parts, in order, by field of `StepInputs` and of `LoraPlan`."""
        tokens, rows, tiles, adapted = program
        step = {
            "tokens": (tokens,),
            "tiles": (rows + tiles, TILE_COLUMNS + self.table_width),
            "places": (tokens if tiles else 0,),
            "sampled": (self.max_num_seqs,),
            "sampling_rows": (self.max_num_seqs, SAMPLING_COLUMNS),
        }
        parts = {(name, ""): shape for name, shape in step.items()}
        sizes = {"max_rank": self.max_rank, "max_pages": self.max_adapter_pages, "num_targets": adapted}
        for name, own in self.lora_plans(program).items():
            parts |= {(name, field): shape for field, shape in plan_shapes(**own, **sizes).items()}
        return parts

    def packed_size(self, program: Program) -> int:
        """Count the elements of a packed step."""
        return sum(math.prod(shape) for shape in self._parts(program).values())

    def view(self, packed: Int[Array | np.ndarray, " packed"], program: Program) -> StepInputs:
        """Take a packed step apart, into views of a NumPy array or slices of a JAX array."""
        found: dict[str, Any] = {}
        begin = 0
        for (name, field), shape in self._parts(program).items():
            end = begin + math.prod(shape)
            part = packed[begin:end] if isinstance(packed, np.ndarray) else jax.lax.slice(packed, (begin,), (end,))
            found.setdefault(name, {})[field] = part.reshape(shape)
            begin = end
        inputs = {name: parts[""] for name, parts in found.items() if "" in parts}
        for name, own in self.lora_plans(program).items():
            inputs[name] = LoraPlan(**found[name], window_tokens=own["window_tokens"])
        if not program.tiles:
            inputs["places"] = None
        return StepInputs(**inputs)
