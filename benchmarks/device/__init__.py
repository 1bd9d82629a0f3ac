"""Correctness and speed on one GPU, in one command of under ten minutes: `python -m benchmarks.device --out DIR`.

DIR gets device.json and device.md, both rewritten after every case, so that a run that is cut off keeps what it has.
`--sections a,b` picks; `--small` (what a CPU gets) runs all of it with a tiny model.

Sections in order of importance, with what they are expected to take on an H100 (nothing of it was measured yet; a program of
the 7B should compile in 5 to 15 s, sixteen of them side by side in 30 to 50):

| section | what | seconds |
|---|---|---|
| machine | what there is; copy, read and link bandwidth, matrix rate | 20 |
| correctness | ops, then the whole 7B step, against the reference, in float32 and bfloat16 | 120 |
| decode | a step of 1 to 128 rows: base, and mixes of adapters, beside what it must read | 100 |
| ops | attention, adapters, matrices and sampling alone, ms a layer | 50 |
| prefill | a step of 2048 tokens: ms, operations a second | 35 |
| loads | adapters from pinned memory into pages, and steps meanwhile | 20 |
| host | host time of a step, busy share of the real loop | 25 |
| variants | compiler options and constants of the kernels, beside what they were expected to do | 110 |
| startup | programs, seconds to compile them cold and from the cache, memory: two starts, 120 s each at most | 60 to 150 |
| peers | torch with CUDA graphs, and transformers + peft, at the same rows and contexts (one row where torch is missing) | 80 |

With 8 s to start each group that is 620 to 720 s in all: the last three sections may be cut by the budget, and can be had by
themselves in a second call (`--sections machine,decode,prefill,peers` sets the peers beside our own steps).

A section is a list of cases (`report.Case`). The command itself never touches the device: it starts a process for each group of
sections, and another when one dies or hangs, which goes on with the next case; so a kernel that poisons the device's state
costs its own case and no other, and memory is free again between groups.
"""
