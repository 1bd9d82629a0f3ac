"""Errors that cross processes: they are made again from `__reduce__`, as by a pool of processes or by Ray."""

from __future__ import annotations

import copy
import inspect

import pytest

from chameleon_jax import errors

PARTS: dict[type[Exception], tuple[str, ...]] = {
    errors.InvalidValue: ("top_p", "top_p is 2; allowed: above 0, at most 1"),
    errors.InvalidGrammar: ("no such rule",),
}
"""Arguments of the errors that take other than a text."""
ERRORS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_that_is_made_again_is_the_same(kind):
    assert issubclass(kind, Exception)
    error = kind(*PARTS.get(kind, ("a reason",)))
    again = copy.copy(error)
    assert type(again) is kind
    assert str(again) == str(error) != ""
    assert vars(again) == vars(error)
