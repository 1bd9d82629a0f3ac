"""Low-rank updates of a decode batch by two Triton kernels, which read weights in place as Punica's do.

A program of `shrink` has 16 rank rows of one row's adapter and a part of d_in. A program of `expand` has some columns of one
row; it sums the parts and adds the update to y. A row finds its adapter through a table, nothing is copied, and every element
of y has one writer. Products are element-wise in float32: a row uses each weight once, so memory is the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from benchmarks.device.sections.peers.torch_lora import RANK_UNIT, AdapterStack, Group, Owners, padded

MAX_SPLITS = 4
"""Largest number of parts of d_in; each costs `expand` a partial sum to read."""
SPLIT_ELEMS = 1024
"""Fewest elements of d_in in a part."""
BLOCK_K = 256
BLOCK_N = 128
STAGES = tl.constexpr(3)


@triton.jit(do_not_specialize=["num_tasks", "steps"])
def _shrink(x, a, tasks, low, num_tasks, steps, d_in, unit: tl.constexpr, block_k: tl.constexpr):
    """Multiply one row of x with 16 rank rows of A, over a part of d_in, into `low[split, target, task, 16]` float32.

    `tasks` is `[num_tasks, 4]` int32: row of x, first rank row of the adapter, its padded rank, first of the 16 in it.
    """
    task, target, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    targets = tl.num_programs(1)
    row = tl.load(tasks + task * 4).to(tl.int64)
    start = tl.load(tasks + task * 4 + 1)
    rank = tl.load(tasks + task * 4 + 2)
    within = tl.load(tasks + task * 4 + 3)
    i = tl.arange(0, unit)
    rows = (start * targets + target * rank + within + i).to(tl.int64) * d_in
    total = tl.zeros([unit, block_k], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        k = (split * steps + step) * block_k + tl.arange(0, block_k)
        inside = k < d_in
        words = tl.load(x + row * d_in + k, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(a + rows[:, None] + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        total += weights * words[None, :]
    at = ((split * targets + target) * num_tasks + task) * unit + i
    tl.store(low + at, tl.sum(total, 1))


@triton.jit(do_not_specialize=["num_tasks"])
def _expand(
    y,
    b,
    low,
    entries,
    num_tasks,
    end0,
    end1,
    width,
    splits: tl.constexpr,
    targets: tl.constexpr,
    unit: tl.constexpr,
    block_n: tl.constexpr,
):
    """Add `low` times B to some columns of one row of y.

    `entries` is `[rows with an adapter, 4]` int32: row of y, first rank row of the adapter, its padded rank, its first task.
    `end0` and `end1` are the columns before the second and the third target.
    """
    column = tl.program_id(0) * block_n
    entry = tl.program_id(1)
    row = tl.load(entries + entry * 4).to(tl.int64)
    start = tl.load(entries + entry * 4 + 1).to(tl.int64)
    rank = tl.load(entries + entry * 4 + 2)
    first = tl.load(entries + entry * 4 + 3)
    target = (column >= end0).to(tl.int32) + (column >= end1).to(tl.int32)
    begin = tl.where(column >= end1, end1, tl.where(column >= end0, end0, 0))
    end = tl.where(column >= end1, width, tl.where(column >= end0, end1, end0))
    i, n = tl.arange(0, unit), tl.arange(0, block_n)
    matrix = b + start * width + rank * begin + (column - begin) + n[None, :]
    total = tl.zeros([unit, block_n], tl.float32)
    for block in tl.range(0, rank // unit, num_stages=STAGES):
        factor = tl.zeros([unit], tl.float32)
        for split in tl.static_range(splits):
            factor += tl.load(low + ((split * targets + target) * num_tasks + first + block) * unit + i)
        weights = tl.load(matrix + (block * unit + i)[:, None] * (end - begin)).to(tl.float32)
        total += weights * factor[:, None]
    at = y + row * width + column + n
    tl.store(at, (tl.load(at).to(tl.float32) + tl.sum(total, 0)).to(y.dtype.element_ty))


class TritonAdapters:
    """Updates of a batch of decode rows in any order; rows may share adapters.

    Args:
        beside: Runs `shrink` on a stream of its own beside the base product, which does not depend on it.
    """

    prompts = False

    def __init__(self, stack: AdapterStack, owners: Owners, *, beside: bool = False):
        self.stack = stack
        device = next(iter(stack.groups.values())).a.device
        adapted = [
            (stack.starts[owner], row, padded(stack.ranks[owner])) for row, owner in enumerate(owners) if owner is not None
        ]
        tasks: list[tuple[int, ...]] = []
        entries: list[tuple[int, ...]] = []
        for start, row, rank in sorted(adapted):  # largest ranks first, and rows of one adapter side by side
            entries.append((row, start, rank, len(tasks)))
            tasks += [(row, start, rank, within) for within in range(0, rank, RANK_UNIT)]
        self._tasks = torch.tensor(tasks, dtype=torch.int32, device=device).view(-1, 4)
        self._entries = torch.tensor(entries, dtype=torch.int32, device=device).view(-1, 4)
        self._stream = torch.cuda.Stream() if beside and device.type == "cuda" else None

    def product(self, layer: int, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply `x [rows, 1, d_in]` with `weight [width, d_in]`, and add the adapters' updates."""
        group = self.stack.groups.get(name)
        if group is None or not len(self._entries):
            return F.linear(x, weight)
        if self._stream is None:
            y = F.linear(x, weight)
            low = self._shrunk(layer, group, x)
        else:
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                low = self._shrunk(layer, group, x)
            y = F.linear(x, weight)
            here.wait_stream(self._stream)
        self._expand(layer, group, low, y)
        return y

    def _shrunk(self, layer: int, group: Group, x: torch.Tensor) -> torch.Tensor:
        """Products with A `[splits, targets, tasks, RANK_UNIT]` float32, to be summed over the splits."""
        d_in = x.shape[-1]
        if x.shape[1] != 1 or not x.is_contiguous():
            raise ValueError(f"x is {list(x.shape)}; the kernels take one token a row, rows back to back")
        splits = max(1, min(MAX_SPLITS, d_in // SPLIT_ELEMS))
        block_k = min(BLOCK_K, triton.next_power_of_2(d_in))
        steps = -(-d_in // (splits * block_k))
        count, targets = len(self._tasks), len(group.targets)
        low = torch.empty(splits, targets, count, RANK_UNIT, dtype=torch.float32, device=x.device)
        _shrink[(count, targets, splits)](
            x, group.a[layer], self._tasks, low, count, steps, d_in, unit=RANK_UNIT, block_k=block_k
        )
        return low

    def _expand(self, layer: int, group: Group, low: torch.Tensor, y: torch.Tensor) -> None:
        block_n = BLOCK_N
        while any(end % block_n for end in group.ends):
            block_n //= 2
        end0, end1 = (*group.ends, group.width, group.width)[:2]
        grid = (group.width // block_n, len(self._entries))
        splits, targets, count, unit = low.shape
        _expand[grid](
            y,
            group.b[layer],
            low,
            self._entries,
            count,
            end0,
            end1,
            group.width,
            splits=splits,
            targets=targets,
            unit=unit,
            block_n=block_n,
        )
