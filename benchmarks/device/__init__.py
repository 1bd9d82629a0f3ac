"""Correctness and speed on one GPU: `python -m benchmarks device --plan` prints the three calls of a half hour.

`--call N --out DIR` runs one of them. DIR gets call-N.json and call-N.md, both rewritten after every row, so that a run that is
cut off keeps its rows, and call-N-programs-K.zip, the compiled programs, which `--cache DIR` takes along to a later call. An
existing report is replaced when its call begins again. Without --call the sections of `--sections a,b`, or all of them, go to
device.json and device.md. `--small` runs a tiny model, as a machine without a GPU does anyway. Calls 1 and 2 have run on an
H200 (docs/performance.md), call 3 on no GPU yet.

| section | content |
|---|---|
| smoke | two layers, a prompt, a decode step and both in one, with and without LoRA, against the reference |
| machine | device and packages; copy, read and link bandwidth, matrix rate |
| correctness | ops, then the whole 7B step, against the reference, in float32 and bfloat16 |
| decode | a step of 1 to 128 rows: base, and mixes of adapters, beside its floor and its prediction |
| prefill | a step of 2048 tokens: ms, operations a second |
| mixed | 32 rows and 512 tokens of a prompt in one step, beside the same work in two |
| peers | torch with CUDA graphs, base and with batched LoRA, and transformers + peft, at the same rows and contexts |
| loads | adapters from pinned memory into pages, and steps meanwhile |
| host | host time of a step, busy share of the real loop |
| ops | attention, adapters, matrices and sampling alone, ms a layer |
| serve_curve | time to first token at two loads, two systems |
| variants | compiler options and constants of the kernels, each beside its prediction |
| startup | programs, seconds to compile them cold and from the cache, memory |
| autotuning | two ways in which XLA chooses kernels: without measuring, and exhaustively |

A section is a list of cases (`report.Case`), each with a limit in seconds. The command itself never touches the device: it
starts a process for each group of sections, and another if one dies or hangs, which goes on with the next case. A kernel that
poisons the device's state costs its own case and no other, and memory is free again between groups.
"""

MEMORY_SHARE = 0.92
"""Share of the device's memory that JAX takes; the driver and the libraries need the rest."""
