"""Run-time check of the shapes in the signatures of `chameleon_jax.models`, on every call in the tests."""

from __future__ import annotations

import builtins
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

NAMES = ("Array", "Bool", "Float", "Int", "Shaped")
"""Names of jaxtyping in signatures. The modules import them, and those of `models.ops.shapes`, for type checkers alone."""
DEVICE_MODULES = (
    "ops",
    "llama",
    "length_proxy",
    "adapters.transfers",
    "runtime.buckets",
    "runtime.steps",
    "runtime.step_inputs",
)
"""Modules of `chameleon_jax.models` that are checked. Others call small functions so often that wrapping them would be slow."""
INSTALLED = all(importlib.util.find_spec(package) for package in ("jaxtyping", "beartype"))
"""False on the GPU machine, which has neither package and checks no shapes."""


def switch_on() -> None:
    """Have DEVICE_MODULES check their shapes; to be called before any of them is imported."""
    if not INSTALLED:
        return
    import beartype  # noqa: F401 (before the builtins grow: it takes the classes that it finds there for Python's own)
    import jaxtyping

    from chameleon_jax.models.ops import shapes

    shared = {name: value for name, value in vars(shapes).items() if name[0].isupper()}
    for name, value in {**shared, **{name: getattr(jaxtyping, name) for name in NAMES}}.items():
        setattr(builtins, name, value)  # annotations are evaluated among a module's globals, then among builtins
    jaxtyping.install_import_hook([f"chameleon_jax.models.{name}" for name in DEVICE_MODULES], "tests.shape_checks.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and results of a function whose signature has shapes.

    Constructors go unchecked: JAX builds its registered dataclasses with anything in place of arrays.
    """
    from beartype import beartype
    from jaxtyping import AbstractArray

    if function.__name__ == "__init__" or not _mentions(inspect.get_annotations(function).values(), AbstractArray):
        return function
    return beartype(function)


def _mentions(hints: Any, kind: type) -> bool:
    """Tell whether any of the hints is a class of `kind`, or has one among its own arguments."""
    return any((isinstance(h, type) and issubclass(h, kind)) or _mentions(getattr(h, "__args__", ()), kind) for h in hints)
