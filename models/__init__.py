"""The Llama model, its device ops, and the runtime that runs them step by step.

Signatures carry shapes. `Float[Array, "rows hidden"]` is an array of floats with two dimensions; within one call a name stands
for one size, in arguments and results alike, and `*batch` stands for any number of leading dimensions. The names of
jaxtyping are imported for type checkers alone, so that a server needs no such package: annotations are never evaluated. The
tests evaluate and check them at run time (`tests/conftest.py`). The dimensions:

    rows                          sequences of a batch that get one token each
    tokens                        tokens of a step, padding included
    tiles, tile_tokens            runs of consecutive tokens of one sequence, and the tokens in each
    width                         pages in a block table
    slots                         places for running sequences, and one more for padding
    packed                        elements of a step's one input array
    num_pages, page_elems         pages of the pool, and elements of a page in one layer
    layers, pages                 decoder layers, and pages of an adapter or of a piece of one
    vocab, hidden, d_in, d_out    tokens of the vocabulary, size of a hidden state, inputs and outputs of a matrix
    heads, kv_heads, head_dim     query heads, key and value heads, elements of a head (half: of half a head)
    targets, windows              matrices that a step adapts, and windows of tokens in its plan
    capacity, blocks, block_rows  rank rows in a plan, the blocks that they fill, and the rows of a block
    classes, length               classes of output length, and tokens that the length proxy reads of a prompt
"""
