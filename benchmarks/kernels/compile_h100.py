"""Programs for an NVIDIA H100, compiled on a machine without one.

This proves lowering, launches, memory and the absence of copies, and nothing about speed. It needs jax's CUDA plugin beside
jax, but no CUDA library (`make h100` installs it apart). Matrix products are not tuned, which takes a GPU: a run there launches
others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections import Counter
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.machine import Out, describe, publish
from chameleon_jax.models.adapters.transfers import PieceSizes
from chameleon_jax.models.config import PRESETS, TARGETS, LlamaConfig
from chameleon_jax.models.llama import abstract_model
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import Program, StepBuckets, shapes_for
from chameleon_jax.models.runtime.compilation import Compilation
from chameleon_jax.models.runtime.programs import Programs

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA"
 dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3" """
"""Description of the device in XLA's target config."""


LAYER_BYTES = 512 << 20
"""Bytes of a layer's pool: 16 GiB over Llama-7B's layers."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Shapes of a model and its pool, and the buckets of a server of 128 requests."""

    config: LlamaConfig
    layout: PageLayout
    buckets: StepBuckets
    graph: nnx.GraphDef
    params: nnx.State
    pages: list[jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, preset: str, num_layers: int | None = None, head_dim: int | None = None, max_rank: int = 128) -> Model:
        config = PRESETS[preset]
        config = dataclasses.replace(config, num_layers=num_layers or config.num_layers, head_dim=head_dim or config.head_dim)
        layout = PageLayout.for_model(config)
        buckets = StepBuckets(
            max_num_seqs=128,
            max_prefill_tokens=2048,
            table_width=layout.pages_for_tokens(2048),
            max_rank=max_rank,
            max_adapter_pages=layout.place({t: max_rank for t in TARGETS}).num_pages,
            **shapes_for("triton"),
        )
        graph, params = nnx.split(abstract_model(config, jnp.dtype("bfloat16")))
        page = jax.ShapeDtypeStruct((LAYER_BYTES // 2 // layout.page_elems, layout.page_elems), jnp.bfloat16)
        return cls(config, layout, buckets, graph, params, [page] * config.num_layers)

    def program(self, rows: int, prompt_tokens: int, adapted: int) -> Program:
        """Choose the program of a step: rows that decode, and a prompt."""
        tiles = self.buckets.step_shapes.tiles(prompt_tokens)
        return self.buckets.choose(Program(rows + prompt_tokens, rows, tiles, adapted))

    def compile_step(self, program: Program) -> Any:
        with for_gpu():
            return self.lower_step(program).compile()

    def lower_step(self, program: Program) -> Any:
        options: dict[str, Any] = {"program": program, "buckets": self.buckets, "layout": self.layout, "backend": "triton"}
        forward = functools.partial(steps.forward, self.graph, **options)
        slots = jax.ShapeDtypeStruct((self.buckets.max_num_seqs + 1,), jnp.int32)
        packed = jax.ShapeDtypeStruct((self.buckets.packed_size(program),), jnp.int32)
        return lower_for_h100(forward, self.params, self.pages, slots, packed, donate_argnums=1)


@functools.cache
def _sharding() -> NamedSharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return NamedSharding(Mesh(np.array(topology.devices).reshape(1), ("x",)), PartitionSpec())


def for_gpu() -> contextlib.AbstractContextManager[Any]:
    """Name the GPU, for which Pallas asks while it lowers since jax 0.11."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


def lower_for_h100(fn: Any, *args: Any, **jit_options: Any) -> Any:
    """Lower `fn` for an H100; `args` are pytrees of anything with a shape and a dtype."""
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding()), args)
    with for_gpu():
        return jax.jit(fn, **jit_options).trace(*specs).lower(lowering_platforms=("cuda",))


def compile_for_h100(fn: Any, *args: Any, **jit_options: Any) -> Any:
    """Compile `fn` for an H100; arguments as for `lower_for_h100`."""
    lowered = lower_for_h100(fn, *args, **jit_options)
    with for_gpu():
        return lowered.compile()


def operations(compiled: Any) -> Counter[str]:
    """Count the HLO operations in the program's entry, which are launched one by one."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    return Counter(re.findall(r"^  %?\S+ = .*? ([a-z][a-z0-9-]*)\(", entry, re.MULTILINE))


def kernels(compiled: Any) -> Counter[str]:
    """Count launches of Pallas kernels by name."""
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line and "custom-call(" in line]
    return Counter(re.findall(r'\bname = "(\w+)"', line)[-1] for line in calls)


def weight_reads(compiled: Any) -> list[int]:
    """Count, for each matrix of the layers, the operations of the program's entry that read it."""
    text = compiled.as_text()
    reads: Counter[str] = Counter()
    matrix_of: dict[str, str] = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        found = re.match(r"  (?:ROOT )?%(\S+) = .*? ([a-z][a-z0-9-]*)\((.*?)\)", line)
        if found is None:
            continue
        name, operation, operands = found.groups()
        if operation == "parameter" and "layers" in name and "weight" in name:
            matrix_of[name], reads[name] = name, 0
        for matrix in {matrix_of[operand] for operand in re.findall(r"%([^\s,]+)", operands) if operand in matrix_of}:
            if operation == "bitcast":
                matrix_of[name] = matrix
            else:
                reads[matrix] += 1
    return list(reads.values())


class LoweredPrograms(Programs):
    """Programs of an engine, traced and lowered for an H100 and not compiled: a start's host cost without XLA."""

    def _compile(self, fn: Any, *arguments: Any, donated: int | tuple[int, ...]) -> Any:
        lower_for_h100(fn, *arguments, donate_argnums=donated)


def start_up_row(model: Model) -> dict[str, Any]:
    """Measure the processor time to trace and lower all programs of a server of 128 requests."""
    pieces = PieceSizes.fit(model.layout.page_bytes(2), model.buckets.max_adapter_pages)
    head: Any = jax.ShapeDtypeStruct((model.config.vocab_size, model.config.hidden_size), jnp.bfloat16)
    dtype = jnp.dtype("bfloat16")
    made = LoweredPrograms(model.graph, model.params, head, model.layout, model.buckets, pieces, dtype, "triton")
    made.num_pages = model.pages[0].shape[0]
    processor, wall = time.process_time(), time.perf_counter()
    Compilation(made, model.config.num_layers).compile_all()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return {"programs": len(made.listing()), "processor s to trace and lower": round(processor, 2), "wall s": round(wall, 2)}


LAUNCHES = ("fusion", "custom-call", "copy", "scatter", "gather", "dot", "while", "conditional")


STEPS = {
    "decode, 1 rows": (1, 0),
    "decode, 32 rows": (32, 0),
    "decode, 128 rows": (128, 0),
    "32 rows + 512 prompt tokens": (32, 512),
    "prefill, 2048 tokens": (0, 2048),
}
"""Rows that decode and tokens of a prompt in a step, by name."""


def programs_of(model: Model) -> list[tuple[str, Program]]:
    """List the programs of the steps, one for each number of adapted targets for which there is one."""
    numbers = model.buckets.adapted(alone=True)
    found = {(name, model.program(*step, adapted)): None for name, step in STEPS.items() for adapted in numbers}
    return list(found)


def step_row(model: Model, name: str, program: Program) -> dict[str, Any]:
    begin = time.perf_counter()
    compiled = model.compile_step(program)
    seconds = time.perf_counter() - begin
    memory, launched, reads = compiled.memory_analysis(), operations(compiled), weight_reads(compiled)
    return {
        "step": name,
        "program": f"{program.tokens} tokens, {program.rows} rows, {program.tiles} tiles",
        "adapters": {0: "none", 4: "q k v o", 7: "all seven"}[program.adapted],
        "launches": sum(launched[kind] for kind in LAUNCHES),
        "a layer": round(sum(launched[kind] for kind in LAUNCHES) / model.config.num_layers, 1),
        "of them kernels of ours": sum(kernels(compiled).values()),
        "weights read": round(sum(reads) / len(reads), 2),
        "pool aliased": f"{memory.alias_size_in_bytes / (len(model.pages) * LAYER_BYTES):.0%}",
        "temporaries, MiB": round(memory.temp_size_in_bytes / 2**20, 1),
        "compiled in, s": round(seconds, 1),
    }


def main(
    model: Annotated[str, typer.Option(help="Model to compile, by the name of its preset.")] = "llama-7b",
    start_up: Annotated[
        bool, typer.Option("--start-up", help="Trace and lower all programs, compile none, and print the time.")
    ] = False,
    out: Out = None,
) -> None:
    """Compile the model's steps for an NVIDIA H100, without a GPU."""
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    made = Model.of(model)
    table = [start_up_row(made)] if start_up else [step_row(made, *step) for step in programs_of(made)]
    publish(describe() | {"model": model, "table": table}, out)
