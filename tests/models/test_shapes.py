"""Shapes in signatures: every public device function has them, and an array of another shape is an error."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from chameleon_jax.models.ops.linear import linear
from chameleon_jax.models.ops.paged_attention import write_kv
from chameleon_jax.models.ops.write_pages import write_by_layers
from tests import shape_checks

MODELS = Path(__file__).parents[2] / "models"
SHARED = {
    target.id
    for node in ast.parse((MODELS / "ops" / "shapes.py").read_text()).body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name)
}
"""Names of shapes that several signatures share."""
HOST_SIDE = {"executor.py", "model_runner.py", "programs.py", "adapter_loads.py"}
"""Files whose functions pass arrays on without a look at their shapes."""

checked = pytest.mark.skipif(not shape_checks.INSTALLED, reason="jaxtyping and beartype are not installed")


@checked
@pytest.mark.parametrize(("x", "weight"), [((3, 8), (4, 7)), ((3, 8), (4,)), ((), (4, 8))])
def test_a_wrong_shape_is_an_error(x, weight):
    with pytest.raises(Exception, match=r"Type-check error[\s\S]*(d_in|d_out)"):
        linear(jnp.ones(x), jnp.ones(weight))


@checked
def test_one_name_is_one_size_across_arguments():
    pages, k, v = jnp.zeros((4, 64)), jnp.zeros((2, 1, 8)), jnp.zeros((2, 1, 8))
    with pytest.raises(Exception, match=r"Type-check error[\s\S]*slots"):
        write_kv(pages, k, v, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32))


@checked
def test_a_shared_name_of_a_shape_is_checked():
    with pytest.raises(Exception, match=r"Type-check error[\s\S]*pages"):
        write_by_layers([jnp.zeros((4, 8))], jnp.zeros((1, 2, 8)), jnp.zeros(3, jnp.int32))


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    """Find the public functions and methods, `__call__` among them."""
    for node in ast.parse(file.read_text()).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef) and (part.name == "__call__" or not part.name.startswith("_")):
                yield part


def shapes(node: ast.AST) -> Iterator[ast.Tuple]:
    """Find the parts of a tree that give an array's type and its shape."""
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Subscript)
            and ast.unparse(part.value) in shape_checks.NAMES
            and isinstance(part.slice, ast.Tuple)
        ):
            yield part.slice


def arrays(function: ast.FunctionDef) -> Iterator[bool]:
    """Tell of each mention of an array in a signature whether it has a shape."""
    arguments = function.args
    hints = [argument.annotation for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg) if argument]
    for hint in filter(None, [*hints, function.returns]):
        inside = {id(node) for part in shapes(hint) for node in ast.walk(part)}
        for node in ast.walk(hint):
            if ast.unparse(node) in ("Array", "jax.Array") and isinstance(node, (ast.Name, ast.Attribute)):
                yield id(node) in inside
            elif isinstance(node, ast.Name) and node.id in SHARED:
                yield True


def test_every_public_device_function_has_shapes_and_is_checked():
    without, count = [], 0
    for file in sorted(MODELS.rglob("*.py")):
        for function in functions(file) if file.name not in HOST_SIDE else ():
            found = list(arrays(function))
            count += bool(found)
            module = ".".join(file.relative_to(MODELS).with_suffix("").parts)
            if not all(found) or (found and not module.startswith(shape_checks.DEVICE_MODULES)):
                without.append(f"{module}.{function.name}")
    assert not without and count >= 34


def test_every_dimension_is_in_the_vocabulary():
    vocabulary = set(re.findall(r"[a-z_]+", ast.get_docstring(ast.parse((MODELS / "__init__.py").read_text())) or ""))
    texts = [ast.unparse(part.elts[1]) for file in MODELS.rglob("*.py") for part in shapes(ast.parse(file.read_text()))]
    names = {name for text in texts for name in re.findall(r"[a-z][a-z_]*", text)}
    assert names and not names - vocabulary
