"""Sizes in which a device prefills."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class PrefillShapes:
    """Tile of a device, and the numbers of tiles for which it has programs.

    Attributes:
        tile: tokens of one sequence that the device handles as a unit.
        sizes: tiles of a step, ascending; a step is padded to the next size. Empty: nothing is padded.
    """

    tile: int
    sizes: tuple[int, ...] = ()

    def tiles(self, tokens: int) -> int:
        """Tiles that a number of tokens of one sequence takes."""
        return -(-tokens // self.tile)

    def padded(self, tokens: int) -> int:
        """Tokens computed for a number of tokens of one sequence, the step's padding not counted."""
        return self.tiles(tokens) * self.tile if self.sizes else tokens

    def step_tokens(self, chunks: Sequence[int]) -> int:
        """Tokens computed in a step with chunks of these lengths, padding included."""
        if not self.sizes:
            return sum(chunks)
        return self._padded_size(sum(map(self.tiles, chunks))) * self.tile

    def size(self, tiles: int, pass_tokens: float) -> int:
        """Choose the size of a step, in tiles.

        The next larger size, or the next smaller one, which needs no padding, where padding costs more than a further step for
        the rest. (The rest may need several steps; one is counted.)

        Args:
            tiles: tiles that wait to be computed.
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
