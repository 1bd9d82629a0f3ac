"""Check of a model argument before JAX is imported, so that a mistake costs a second instead of several."""

from __future__ import annotations

import difflib
from pathlib import Path

from chameleon_jax.checks import require

HUB_TIMEOUT_S = 5.0
LOADABLE = ("smollm2-135m",)
"""Presets whose weights can be read; all presets have dummy weights."""


def check_model(model: str, load_format: str = "auto") -> None:
    """Check that a model exists. Reads no weights, and asks the hub about an id that is not in its cache.

    Args:
        model: Preset, GGUF file, Hugging Face or Orbax directory, or hub id.
        load_format: "dummy" allows every preset and needs no weights.

    Raises:
        ValueError: The model cannot be found; names the nearest preset.
    """
    from chameleon_jax.models.config import PRESETS

    presets = tuple(PRESETS) if load_format == "dummy" else LOADABLE
    path = Path(model)
    if model in presets or path.is_file():
        return
    if path.is_dir():
        found = (path / "config.json").is_file()
        require(found, "model", model, "a GGUF file, or a directory with config.json")
    elif load_format == "dummy" or path.suffix == ".gguf" or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ValueError(f"model is {model!r}: no such file or directory{_hint(model, presets)}")
    elif reason := _missing_on_hub(model):
        raise ValueError(f"model is {model!r}: no such file or directory, and {reason}{_hint(model, presets)}")


def _hint(model: str, presets: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(model, presets, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; presets: {', '.join(presets)}"


def _missing_on_hub(model: str) -> str | None:
    """Reason why the hub does not provide a model; None where it does."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.snapshot_download(model, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError:
        return "a hub id has the form organisation/name"
    else:
        return None
    try:
        huggingface_hub.model_info(model, timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError:
        return None  # its files may be readable; loading says why they are not
    except errors.RepositoryNotFoundError:
        return "the hub has no such model, or it is private and no token is set"
    except Exception as error:  # errors of the connection are those of the hub's HTTP library, which differs between versions
        return f"the hub cannot be reached ({error})"
    return None
