"""Tensors of safetensors files by the dtypes that the format names; NumPy alone knows neither bfloat16 nor float8."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

FLOATS: dict[str, Any] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
FLOAT8: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


def read_file(file: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads all tensors at once, float8 too; the file may change or vanish afterwards.

    It is not mapped: a file that is cut while it is mapped ends the process.

    Raises:
        ValueError: it is too large, not safetensors, or has a tensor that is no floating-point number.
        OSError: it cannot be read.
    """
    if (size := file.stat().st_size) > max_bytes:
        raise ValueError(f"it has {size} bytes; allowed: {max_bytes}")
    try:
        tensors = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    dtypes = FLOATS | FLOAT8
    for name, tensor in tensors:
        _check_dtype(name, tensor["dtype"], dtypes)
    return {name: np.frombuffer(t["data"], dtypes[t["dtype"]]).reshape(t["shape"]) for name, t in tensors}


class SafetensorsMapping(Mapping[str, np.ndarray]):
    """Tensors of several files, each read when it is asked for.

    Raises:
        ValueError: a file cannot be read, two files have one tensor, or a tensor is not of `FLOATS`.
    """

    def __init__(self, files: list[Path]):
        self._files: dict[str, Path] = {}
        self._handles = {}
        for file in files:
            try:
                self._handles[file] = safetensors.safe_open(str(file), framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            for name in self._handles[file].keys():  # noqa: SIM118 (a handle is no mapping)
                if name in self._files:
                    raise ValueError(f"tensor {name} is in {self._files[name].name} and in {file.name}; allowed: one of them")
                self._files[name] = file

    def __getitem__(self, name: str) -> np.ndarray:
        handle = self._handles[self._files[name]]
        _check_dtype(name, handle.get_slice(name).get_dtype(), FLOATS)
        tensor: np.ndarray = handle.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _check_dtype(name: str, dtype: str, allowed: Collection[str]) -> None:
    if dtype not in allowed:
        raise ValueError(f"tensor {name} is of dtype {dtype}; allowed: {', '.join(allowed)}")
