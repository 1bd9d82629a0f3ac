"""The Llama model, its device ops, and the runtime that runs them step by step.

Signatures carry shapes. `Float[Array, "rows hidden"]` is an array of floats with two dimensions; within one call a name stands
for one size, in arguments and results alike, and `*batch` stands for any number of leading dimensions. The names of
jaxtyping are imported for type checkers alone, so that a server needs no such package: annotations are never evaluated. The
tests evaluate and check them at run time (`tests/conftest.py`). Shapes that several signatures share have names in
`models/ops/shapes.py`. The dimensions:

    rows, columns                 sequences of a batch that get one token each, and their packed sampling parameters
    masks                         rows whose masks are given
    prompts, length, classes      prompts of the length proxy, tokens that it reads of each, and classes of output length
    tokens, most_tokens           tokens of a step, padding included, and of the largest step
    planned_tokens                tokens that an adapters' plan covers, the first of a step
    tiles, tile_tokens            runs of consecutive tokens of one sequence, and the tokens in each
    rows_and_tiles                sequences that decode, then the tiles of prompts
    width                         pages in a block table
    sequences                     sequences that may run at once
    slots                         places for running sequences, and one more for padding
    packed                        elements of a step's one input array
    units                         groups of elements that an adapter's rows consist of
    num_pages, page_elems         pages of the pool, and elements of a page in one layer
    layers, pages                 decoder layers, and pages of an adapter or of a piece of one
    words                         masks of 32 tokens each, as many as cover the vocabulary
    vocab, best                   tokens of the vocabulary, and the best ones whose log-probabilities are reported
    hidden, d_in, d_out           size of a hidden state, inputs and outputs of a matrix or of several side by side
    heads, kv_heads               query heads, key and value heads
    head_dim, half                elements of a head, and half of them
    adapters                      adapters of a batch
    targets, windows              matrices that a step adapts, and windows of tokens in its plan
    starts_and_pages              starts of an adapter's runs of rows, then its pages
    rank_rows, capacity           rank rows, and the number that a plan has room for
    blocks, block_rows            blocks that rank rows fill, and the rows of a block
    all_blocks                    blocks of all targets together
    splits, tile                  parts of d_in, and tokens of a window as kernels round them
"""
