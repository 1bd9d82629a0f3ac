"""The benchmark of device ops: every case is traced, none is run."""

from __future__ import annotations

import jax

from benchmarks.kernels import ops


def test_every_case_is_an_op_of_its_shape(monkeypatch):
    traced = []

    def trace(run, *arguments, **_):
        traced.append(jax.eval_shape(run, *arguments))
        return 1.0

    monkeypatch.setattr(ops, "best_ms", trace)
    monkeypatch.setattr(ops, "LAYERS", 1)
    monkeypatch.setattr(ops, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(ops, "matmul_rate", lambda: 1e12)
    table = ops.measure()["table"]
    forms = [len(row) - 2 for row in table]  # beside its name and its floor
    assert sum(forms) == len(traced)
    assert min(forms) >= 2
    assert all(row["floor"] > 0 for row in table)
    assert {(shape.shape, shape.dtype.name) for shape in traced} == {
        *(((rows, 576), "float32") for rows in (1, 2, 8, 32, 128, 512)),
        *(((rows, 9, 64), "float32") for rows in (8, 32)),
        ((), "float32"),  # the adapters' updates are summed
    }
