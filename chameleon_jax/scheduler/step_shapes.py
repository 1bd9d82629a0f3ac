"""Sizes of the steps for which a device has programs."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """Sizes of steps that have prompts, as a device has programs for them.

    Attributes:
        sizes: tokens of a step, its decode rows among them, ascending; a step is padded to the next size. Empty: nothing is
            padded.
        tile: tokens of one prompt that attention takes together. A step of some size has room for a number of tiles.
    """

    sizes: tuple[int, ...] = ()
    tile: int = 1

    def tiles(self, tokens: int) -> int:
        """Tiles that a number of tokens of one prompt takes."""
        return -(-tokens // self.tile)

    def room(self, size: int) -> int:
        """Tiles that a step of a size has room for: twice those that it fills, as each prompt's last one may have gaps."""
        return 2 * self.tiles(size)

    @property
    def most_tiles(self) -> float:
        """Tiles that a step has room for."""
        return self.room(self.sizes[-1]) if self.sizes else math.inf

    def padded(self, tokens: int, tiles: int = 0) -> int:
        """Tokens that the device computes for a step of so many, its decode rows among them, and so many tiles of prompts."""
        sizes = (size for size in self.sizes if size >= tokens and self.room(size) >= tiles)
        return next(sizes, tokens) if tokens else 0

    def size(self, tokens: int, tiles: int, rows: int, pass_tokens: float) -> int:
        """Choose the size of a step, given the prompt tokens that wait to be computed and the tiles that they take.

        The size that has room for all, or the next smaller one, where padding costs more than a further step for the rest. (The
        rest may need several steps; one is counted.)

        Args:
            tokens: prompt tokens that wait.
            tiles: their tiles.
            rows: decode rows of the step.
            pass_tokens: fixed cost of a further step's prompts, in prompt tokens.
        """
        padded = self.padded(rows + tokens, tiles)
        if padded - rows - tokens <= pass_tokens:
            return padded
        return max((size for size in self.sizes if rows < size < padded), default=padded)


ANY_SIZE = StepShapes()
"""Shapes of a device that computes just the tokens that it is given."""
