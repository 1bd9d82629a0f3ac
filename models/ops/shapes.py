"""Arrays that several signatures name, by their content; `chameleon_jax.models` lists the dimensions.

Like the names of jaxtyping, these are imported for type checkers alone.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int, UInt16

Pool = Float[Array, "num_pages page_elems"]
"""Page pool of one layer."""
Pools = list[Pool]
"""Page pool of each layer."""
Block = Float[Array, "layers pages page_elems"]
"""Packed adapter, or a piece of one."""
PageIds = Int[Array, " pages"]
"""Pages of the pool that a block goes to."""

Queries = Float[Array, "tokens heads head_dim"]
"""Queries of a step's tokens, or the values that they attend to."""
Tables = Int[Array, "tiles width"]
"""Block table of each tile's sequence."""
Tiles = Int[Array, " tiles"]
"""A number for each tile."""
KeyValues = Float[Array, "tokens kv_heads head_dim"]
"""Keys or values of a step's tokens."""
Tokens = Int[Array, " tokens"]
"""A number for each token."""

Inputs = Float[Array, "tokens d_in"]
"""Inputs of the matrices that an adapter changes."""
Outputs = Float[Array, "tokens d_out"]
"""Outputs of these matrices."""
Products = Float[Array, "blocks splits targets tile block_rows"]
"""Inputs multiplied by A: one product for each block of rank rows and part of d_in."""

Hidden = Float[Array, "*batch hidden"]
"""Hidden states."""
Logits = Float[Array, "rows vocab"]
"""A value for each token of the vocabulary, in each row."""
RowFloats = Float[Array, " rows"]
"""A number for each row."""
RowInts = Int[Array, " rows"]
"""An integer for each row."""
SlotTokens = Int[Array, " slots"]
"""Token last sampled for each slot."""
TokenCounts = UInt16[Array, "slots vocab"]
"""How often each slot's prompt and output have each token, as sampling.OUTPUT_COUNT says."""
