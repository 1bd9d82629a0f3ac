"""JSON files of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: the file.
        missing_ok: return an empty object where there is no such file.

    Raises:
        ValueError: the file cannot be read or holds no object; names it.
    """
    if missing_ok and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; allowed: an object")
    return value
