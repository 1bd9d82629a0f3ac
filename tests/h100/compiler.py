"""Compiles for an NVIDIA H100 on a machine that has none. Needs jax's CUDA plugin, but no CUDA library."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA"
 dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3" """
"""What XLA's target config says of the device."""


@functools.cache
def _sharding() -> NamedSharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return NamedSharding(Mesh(np.array(topology.devices).reshape(1), ("x",)), PartitionSpec())


def _for_gpu() -> contextlib.AbstractContextManager[Any]:
    """Since jax 0.11 Pallas asks while it lowers what GPU it is for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


def compile_for_h100(fn: Any, *args: Any, **jit_options: Any) -> Any:
    """The compiled program; `args` are pytrees of anything with a shape and a dtype."""
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding()), args)
    with _for_gpu():
        return jax.jit(fn, **jit_options).trace(*specs).lower(lowering_platforms=("cuda",)).compile()


def operations(compiled: Any) -> Counter[str]:
    """How often each HLO operation stands in the program's entry: what is launched, one by one."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    return Counter(re.findall(r"^  %?\S+ = .*? ([a-z][a-z0-9-]*)\(", entry, re.MULTILINE))


def kernels(compiled: Any) -> Counter[str]:
    """Launches of Pallas kernels by name."""
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line and "custom-call(" in line]
    return Counter(re.findall(r'\bname = "(\w+)"', line)[-1] for line in calls)
