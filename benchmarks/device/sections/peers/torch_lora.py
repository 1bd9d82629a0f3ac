"""Low-rank updates of many adapters in torch: adapters stacked on the device, ranks padded to RANK_UNIT, batched products.

Alpha is part of B. Each way in which a batch finds its adapters is a class: `BmmAdapters` here, `TritonAdapters` in
triton_lora.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from chameleon_jax.models.config import LlamaConfig

RANK_UNIT = 16
"""Divisor of the padded ranks, as in Punica and vLLM."""
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Targets that share an input, by the name of their matrix in `LayerWeights`."""

Owners = Sequence[int | None]
"""Number of each row's adapter in the stack, None for a row without an adapter."""


def padded(rank: int) -> int:
    return -(-rank // RANK_UNIT) * RANK_UNIT


def stack_elems(config: LlamaConfig, ranks: Sequence[int], targets: Sequence[str]) -> int:
    """Elements that adapters of these ranks take in a stack, padding included."""
    return sum(map(padded, ranks)) * sum(sum(config.target_shape(t)) for t in targets) * config.num_layers


@dataclasses.dataclass(frozen=True)
class RankClass:
    """Adapters of one padded rank, which lie back to back.

    Attributes:
        first_row: Rank rows of the stack before them.
        adapters: Their numbers, in the stack's order.
    """

    rank: int
    first_row: int
    adapters: list[int]


@dataclasses.dataclass(frozen=True)
class Group:
    """Stacked matrices of targets that share an input.

    Attributes:
        ends: Columns of the targets up to and with each one; the last is the width of the product.
        a: `[layers, rank rows * targets, d_in]`. An adapter's targets follow one another, each `[padded rank, d_in]`.
        b: `[layers, rank rows * width]`. An adapter's targets follow one another, each `[padded rank, d_out]`.
    """

    targets: tuple[str, ...]
    ends: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor

    @property
    def width(self) -> int:
        return self.ends[-1]

    @property
    def alike(self) -> bool:
        """Whether all targets have the same d_out."""
        return len({end - begin for begin, end in self.columns}) == 1

    @property
    def columns(self) -> list[tuple[int, int]]:
        """First and last column (exclusive) of each target."""
        return list(zip((0, *self.ends), self.ends))

    def class_a(self, layer: int, cls: RankClass) -> torch.Tensor:
        """View of A for a class, `[adapters, targets * rank, d_in]`."""
        begin, rows = cls.first_row * len(self.targets), cls.rank * len(self.targets)
        return self.a[layer, begin : begin + rows * len(cls.adapters)].view(len(cls.adapters), rows, -1)

    def class_b(self, layer: int, cls: RankClass) -> torch.Tensor:
        """View of B for a class, `[adapters, rank * width]`; target t's `[rank, d_out]` begins at `rank * columns[t][0]`."""
        begin, elems = cls.first_row * self.width, cls.rank * self.width
        return self.b[layer, begin : begin + elems * len(cls.adapters)].view(len(cls.adapters), elems)


class AdapterStack:
    """Adapters of some ranks in device memory, largest padded rank first.

    Args:
        targets: Targets of every adapter. Targets that share an input come together or not at all.

    Attributes:
        starts: Rank rows of the stack before each adapter.
    """

    def __init__(
        self, config: LlamaConfig, ranks: Sequence[int], targets: Sequence[str], dtype: torch.dtype, device: torch.device
    ):
        self.ranks = list(ranks)
        order = sorted(range(len(ranks)), key=lambda i: -padded(ranks[i]))
        ends = list(itertools.accumulate(padded(ranks[i]) for i in order))
        self.starts = dict(zip(order, [0, *ends]))
        self.classes = [
            RankClass(rank, self.starts[members[0]], members)
            for rank, members in ((rank, list(found)) for rank, found in itertools.groupby(order, lambda i: padded(ranks[i])))
        ]
        self.groups: dict[str, Group] = {}
        for name, group in GROUPS.items():
            if not set(group) & set(targets):
                continue
            if not set(group) <= set(targets):
                raise ValueError(f"targets are {', '.join(targets)}; {', '.join(group)} come together or not at all")
            shapes = [config.target_shape(t) for t in group]
            widths = tuple(itertools.accumulate(d_out for _, d_out in shapes))
            like = {"dtype": dtype, "device": device}
            a = torch.zeros(config.num_layers, ends[-1] * len(group), shapes[0][0], **like)
            b = torch.zeros(config.num_layers, ends[-1] * widths[-1], **like)
            self.groups[name] = Group(group, widths, a, b)

    def put(self, adapter: int, layer: int, target: str, a: np.ndarray, b: np.ndarray) -> None:
        """Copy A `[rank, d_in]` and B `[d_out, rank]`, scaled by alpha / rank, into the stack."""
        group = next(group for group in self.groups.values() if target in group.targets)
        start, rank, place = self.starts[adapter], padded(self.ranks[adapter]), group.targets.index(target)
        row = start * len(group.targets) + place * rank
        group.a[layer, row : row + a.shape[0]].copy_(torch.from_numpy(a))
        begin, end = group.columns[place]
        at = start * group.width + rank * begin
        group.b[layer, at : at + rank * (end - begin)].view(rank, -1)[: b.shape[1]].copy_(torch.from_numpy(b.T.copy()))

    def randomize(self) -> AdapterStack:
        """Draw all rows on the device, padding included; a product costs the same with any values."""
        for group in self.groups.values():
            group.a.normal_(std=group.a.shape[-1] ** -0.5)
            group.b.normal_(std=0.1)
        return self


class BmmAdapters:
    """Two batched products of the libraries for each rank class: x with A, then with B, added to the base product.

    Args:
        in_order: Reads adapters in place, without a look-up. Rows must be ordered as the stack is, each with its own adapter,
            so that a server which keeps adapters in any order can at best be as fast. Otherwise rows name adapters by index
            in any order, and a step copies the adapters of its rows before it multiplies them.

    Raises:
        ValueError: The rows are in another order, with `in_order`.
    """

    prompts = True
    """Whether a step may have more than one token a row."""

    def __init__(self, stack: AdapterStack, owners: Owners, *, in_order: bool):
        self.stack = stack
        self._parts: list[tuple[RankClass, slice | torch.Tensor, slice | torch.Tensor]] = []
        device = next(iter(stack.groups.values())).a.device
        for cls in stack.classes:
            rows = [row for row, owner in enumerate(owners) if owner in cls.adapters]
            which = [cls.adapters.index(owners[row]) for row in rows]  # type: ignore[arg-type]
            if rows and in_order:
                self._parts.append((cls, _range_of(rows), _range_of(which)))
            elif rows:
                self._parts.append((cls, torch.tensor(rows, device=device), torch.tensor(which, device=device)))

    def product(self, layer: int, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply `x [rows, tokens, d_in]` with `weight [width, d_in]`, and add the adapters' updates."""
        y = F.linear(x, weight)
        group = self.stack.groups.get(name)
        if group is not None:
            for cls, rows, which in self._parts:
                low = torch.bmm(_take(x, rows), _take(group.class_a(layer, cls), which).transpose(1, 2))
                for columns, factor, b in self._expansions(group, cls, low, _take(group.class_b(layer, cls), which)):
                    part = y[..., columns]
                    if isinstance(rows, slice):
                        into = part[rows].view(factor.shape[0], factor.shape[1], -1)
                        into.baddbmm_(factor, b)
                    else:
                        part.index_add_(0, rows, torch.bmm(factor, b).view(rows.shape[0], *part.shape[1:]))
        return y

    @staticmethod
    def _expansions(
        group: Group, cls: RankClass, low: torch.Tensor, b: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Columns of y, and the two factors of their update.

        One product serves all targets of a decode step if they have the same width. `low` is `[rows, tokens, targets * rank]`,
        and `b` is `[rows, rank * width]`.
        """
        rows, tokens = low.shape[:2]
        if group.alike and tokens == 1:
            many = rows * len(group.targets)
            yield slice(None), low.reshape(many, 1, cls.rank), b.reshape(many, cls.rank, -1)
            return
        for place, (begin, end) in enumerate(group.columns):
            matrix = b[:, cls.rank * begin : cls.rank * end].view(rows, cls.rank, end - begin)
            yield slice(begin, end), low[..., place * cls.rank : (place + 1) * cls.rank], matrix


def _take(x: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    """Return a view, or copies of the indexed adapters."""
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


def _range_of(numbers: list[int]) -> slice:
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError("rows are not ordered as the stack is, each with another adapter")
    return slice(numbers[0], numbers[0] + len(numbers))


def in_stack_order(stack: AdapterStack, owners: Owners) -> list[int | None]:
    """Sort the rows of a batch as the stack is, rows without an adapter last."""
    return sorted(owners, key=lambda owner: math.inf if owner is None else stack.starts[owner])
