"""Defaults of sampling parameters, from a model's generation_config.json."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.checkpoints.json_file import read_json
from chameleon_jax.checks import require
from chameleon_jax.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Fields of the file that are used, and their names in `SamplingParams`. `do_sample` is ignored, as in vLLM."""
NO_DEFAULTS = ("none", "vllm")
"""Values of `generation_config` that ignore a model's defaults; the second is vLLM's word."""


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """Values of fields of `SamplingParams` that requests may leave out."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, source: str, model_file: Path | None) -> SamplingDefaults:
        """Read the defaults that the setting `generation_config` asks for. Raises ValueError.

        Args:
            source: The setting.
            model_file: The model's own file; None where it has none.
        """
        file = generation_file(source)
        if file is None and source not in NO_DEFAULTS:
            file = model_file
        return cls({}) if file is None else cls.read(file)

    @classmethod
    def read(cls, file: Path) -> SamplingDefaults:
        """Read the fields that can be served, and log the others. Raises ValueError where the file is not JSON."""
        config = read_json(file)
        values: dict[str, Any] = {}
        for name, field in FIELDS.items():
            value = config.get(name)
            if value is None:
                continue
            try:
                require(not isinstance(value, bool), name, value, "a number")
                values[field] = getattr(SamplingParams(**{field: value}), field)
            except ValueError as error:
                allowed = str(error).partition("; allowed: ")[2]
                logger.warning("%s: %s is %.100r and is not used; allowed: %s", file, name, value, allowed)
        if values:
            shown = ", ".join(f"{field} {value}" for field, value in values.items())
            logger.info("sampling defaults of %s: %s; generation_config 'none' leaves them out", file, shown)
        return cls(values)

    def params(self, **given: Any) -> SamplingParams:
        """Make parameters of the given fields and the defaults for the others. Raises ValueError."""
        return SamplingParams(**{**self.values, **given})


def generation_file(source: str) -> Path | None:
    """Find the file that the setting `generation_config` names; None where it names no directory. Raises ValueError."""
    if source == "auto" or source in NO_DEFAULTS:
        return None
    file = Path(source) / huggingface.GENERATION_FILE
    allowed = f"auto, none, or a directory with {huggingface.GENERATION_FILE}"
    require(bool(source) and file.is_file(), "generation_config", source, allowed)
    return file
