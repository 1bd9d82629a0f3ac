"""A GGUF file's metadata fields and tensors, read with the `gguf` package and checked as they are read.

In parts of 64 rows the package dequantises 190 MB of Q4_K and 175 MB of Q5_K a second on one core of an AMD EPYC (2026-11-27,
best of 3 runs; half of that while other programs ran): half a minute for 7B weights. Two threads were no faster.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from chameleon_jax.checks import require

_T = TypeVar("_T", int, float, bool, str)
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "number"),
    float: ((int, float), "number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
}
_ROWS = 64
"""Rows dequantised at a time: a block's temporary arrays stay in the processor's cache."""


class GgufFile:
    """A GGUF file. Tensors are mapped, and read when they are asked for.

    Attributes:
        tensors: Tensors of the `gguf` package by their name in the file.

    Raises:
        ValueError: The file is broken, or a field or tensor has a value or type that is not allowed. The message names it.
    """

    def __init__(self, path: str | Path):
        reader = _Reader(path)
        self._path = path
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """Read a field of one value, or return the default where the file has no such field."""
        value: Any = self.contents(name, default)
        types, allowed = _TYPES[kind]
        require(type(value) in types, name, value, f"one {allowed}" if allowed == "number" else allowed)
        return kind(value)

    def list_field(self, name: str, kind: type[_T], length: int | None = None, default: list[_T] | None = None) -> list[_T]:
        """Read a field of many values, or return the default where the file has no such field.

        Args:
            name: Name of the field.
            kind: Type of the values.
            length: Number of values that the field must have. None: any.
            default: Value of a field that is missing.
        """
        values: Any = self.contents(name, default)
        types, allowed = _TYPES[kind]
        require(isinstance(values, list) and set(map(type, values)) <= set(types), name, values, f"a list, each {allowed}")
        require(length in (None, len(values)), f"length of {name}", len(values), f"{length}, the number of tokens")
        return values  # type: ignore[no-any-return]

    def contents(self, name: str, default: Any = None) -> Any:
        """Read a field of any type, or return the default where the file has no such field."""
        if name not in self._fields:
            if default is None:
                raise ValueError(f"{self._path} has no field {name}")
            return default
        try:
            return self._fields[name].contents()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Look up the shape of a tensor, the matrices' `[d_out, d_in]`."""
        if name not in self.tensors:
            raise ValueError(f"the file has no tensor {name}")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """Dequantise a tensor to float32."""
        shape, kind = self.shape(name), self.tensors[name].tensor_type
        data = self.tensors[name].data
        if kind == GGMLQuantizationType.F32:
            return np.asarray(data, np.float32)
        # in one call the library first collects all parts, then copies them: half as fast
        rows = data.reshape(-1, data.shape[-1])
        array = np.empty((len(rows), shape[-1]), np.float32)
        for start in range(0, len(rows), _ROWS):
            array[start : start + _ROWS] = gguf.dequantize(rows[start : start + _ROWS], kind)
        return array.reshape(shape)

    def check_types(self) -> None:
        """Check that every tensor can be dequantised."""
        for tensor in self.tensors.values():
            if not _is_readable(tensor.tensor_type):
                allowed = ", ".join(kind.name for kind in GGMLQuantizationType if _is_readable(kind))
                raise ValueError(f"tensor {tensor.name} has type {tensor.tensor_type.name}; allowed: {allowed}")


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Reader whose errors say where a file is broken, and which does not read on behind the file's end."""

    _tensor: str | None = None
    tensors: list[Any]

    def __init__(self, path: str | Path):
        try:
            super().__init__(str(path))
            if self.byte_order != "I":  # the library swaps fields, not blocks of weights
                raise ValueError("its bytes are in the other order")
        except Exception as error:  # the library raises many types on broken files
            fields = list(getattr(self, "fields", ()))
            place = f" at tensor {self._tensor}" if self._tensor else f" behind the field {fields[-1]}" if fields else ""
            raise ValueError(f"{path} cannot be read{place}: {error}") from error

    @property
    def data(self) -> np.ndarray:
        """Bytes of the file, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)  # of a plain array, a slice takes half the time; a vocabulary has 100,000

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError("the file ends too early")
        found = self.data[offset:end]
        if dtype is np.uint8:
            return found
        order = self.byte_order if override_order is None else override_order
        return found.view(dtype if order == "I" else np.dtype(dtype).newbyteorder(order))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        """Read a field, as the library does, arrays of numbers and of texts in an eighth of its time."""
        if raw_type != GGUFValueType.ARRAY:
            return self._other_parts(orig_offs, raw_type)
        kind, count, begin = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64), orig_offs + 12
        item = GGUFValueType(kind[0])
        dtype = self.gguf_scalar_to_np.get(item)
        least = self._get(begin, np.uint8 if dtype is None else dtype, count[0])  # raises where the file ends before
        if dtype is not None:
            end, step, parts = begin + least.nbytes, 1, list(least.reshape(-1, 1))
        elif item is GGUFValueType.STRING:
            end, step, parts = begin, 2, []
            for _ in range(int(count[0])):
                length = self._get(end, np.uint64)
                parts += [length, self._get(end + 8, np.uint8, length[0])]
                end += 8 + int(length[0])
        else:
            return self._other_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([item] if parts else [])]
        return end - orig_offs, [kind, count, *parts], list(range(1 + step, 2 + len(parts), step)), types

    def _other_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return found

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        found: dict[str, Any] = {}
        for field in fields:
            self._tensor = field.name
            if field.name in found:
                raise ValueError("the file has it twice")
            super()._build_tensors(start_offs, [field])
            found[field.name] = self.tensors[0]
        self.tensors, self._tensor = list(found.values()), None


@functools.cache
def _is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether the library can dequantise a type, tried on one block of zeros."""
    elements, size = gguf.GGML_QUANT_SIZES.get(kind, (1, 0))
    try:
        return bool(size) and gguf.dequantize(np.zeros((1, size), np.uint8), kind).shape == (1, elements)
    except NotImplementedError:
        return False
