"""The sizes in which a device prefills."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class PrefillShapes:
    """Tiles, and the numbers of them for which there are programs.

    Attributes:
        tile: tokens of one sequence that the device handles as a unit.
        sizes: tiles of a step, ascending; a step is padded to the next size. Empty: nothing is padded.
    """

    tile: int
    sizes: tuple[int, ...] = ()

    def tiles(self, tokens: int) -> int:
        """Tiles that so many tokens of one sequence take."""
        return -(-tokens // self.tile)

    def padded(self, tokens: int) -> int:
        """Tokens that are computed for so many of one sequence, the step's padding not counted."""
        return self.tiles(tokens) * self.tile if self.sizes else tokens

    def step_tokens(self, chunks: Sequence[int]) -> int:
        """Tokens that are computed in a step of such chunks, padding included."""
        if not self.sizes:
            return sum(chunks)
        return self._padded_size(sum(map(self.tiles, chunks))) * self.tile

    def size(self, tiles: int, pass_tokens: float) -> int:
        """The size of a step, in tiles, for which so many wait: the next one, or the one below, which needs no padding, where
        padding costs more than a further step for the rest. (The rest may need several; one is counted.)

        Args:
            pass_tokens: fixed cost of a step's prefill, in prompt tokens.
        """
        padded = self._padded_size(tiles)
        if (padded - tiles) * self.tile <= pass_tokens:
            return padded
        return max((size for size in self.sizes if size <= tiles), default=padded)

    def _padded_size(self, tiles: int) -> int:
        return next((size for size in self.sizes if size >= tiles), tiles) if tiles else 0


ANY_SIZE = PrefillShapes(tile=32)
"""Shapes of a device that computes just the tokens that it is given."""
