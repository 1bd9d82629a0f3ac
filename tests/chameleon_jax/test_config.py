"""Settings by name: typed, and refused with the nearest name."""

from __future__ import annotations

import re
from typing import get_type_hints

import numpy as np
import pytest

from chameleon_jax.config import EngineConfig, EngineSettings


def test_typed_settings_are_the_fields_of_the_configuration() -> None:
    assert get_type_hints(EngineSettings) == get_type_hints(EngineConfig)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_num_seq", 8, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'? allowed: compile_programs, dtype"),
        ("gpu_memory_utilisation", 0.5, "did you mean 'gpu_memory_utilization'?"),
        ("xyz", 2, "unknown setting 'xyz'; allowed: "),
        ("max_num_seqs", "8", "max_num_seqs is '8'; allowed: int"),
        ("max_num_seqs", True, "max_num_seqs is True; allowed: int"),
        ("max_model_len", 8.5, "max_model_len is 8.5; allowed: int | None"),
        ("enable_lora", "no", "enable_lora is 'no'; allowed: bool"),
        ("ttft_slo", "5", "ttft_slo is '5'; allowed: float"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig.of({name: value})


def test_integers_are_numbers_and_numpy_s_are_too() -> None:
    config = EngineConfig.of({"ttft_slo": 5, "max_num_seqs": np.int64(8), "num_pages": None})
    assert (config.ttft_slo, config.max_num_seqs) == (5, 8)
