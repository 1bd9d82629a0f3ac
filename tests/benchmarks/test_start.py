"""Measure of a server's start."""

from __future__ import annotations

import pytest

from benchmarks.serving.start import started


def test_a_server_that_does_not_start_is_reported(tmp_path):
    with started("sometimes", str(tmp_path)) as start, pytest.raises(RuntimeError, match="did not start.*compile_programs"):
        start.wait()
    assert start.process.returncode == 1 and start.seconds > 0
