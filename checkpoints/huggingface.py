"""Hugging Face directories and hub ids: config.json, safetensors, tokenizer. Pickled weights are never opened."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.numpy

from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.json_file import read_json
from chameleon_jax.checkpoints.safetensors_file import SafetensorsMapping
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.llama import ModelTensors

GENERATION_FILE = "generation_config.json"


def load(path_or_id: str | Path) -> Checkpoint:
    """Read a local directory, or a hub id, which is downloaded or found in the hub's cache.

    Raises:
        ValueError: the model is not Llama-shaped or not in safetensors; names the missing or invalid part.
    """
    directory = Path(path_or_id)
    if not directory.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
        try:
            directory = Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=patterns))
        except Exception as error:
            raise ValueError(
                f"model is {str(path_or_id)!r}: no such directory, and the hub did not provide it: {error}"
            ) from error
    config = read_config(directory)
    tensors = ModelTensors(config, SafetensorsMapping(_find_weights(directory)))
    tokenizer = Tokenizer.from_directory(directory, config.eos_token_ids)
    return Checkpoint(config, tensors, tokenizer, generation_file(directory))


def read_config(directory: Path) -> LlamaConfig:
    """Read config.json and generation_config.json; raise ValueError where one is missing or invalid."""
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory} has no config.json")
    hf = read_json(file)
    generation = generation_file(directory)
    if generation is not None and (eos := read_json(generation).get("eos_token_id")) is not None:
        hf["eos_token_id"] = eos  # chat models often name their end-of-turn token only here
    return LlamaConfig.from_hf(hf)


def generation_file(directory: Path) -> Path | None:
    """Find the directory's generation_config.json; None where it has none."""
    file = directory / GENERATION_FILE
    return file if file.is_file() else None


def _find_weights(directory: Path) -> list[Path]:
    """Find the single file, else the index's files, else every safetensors file: the order of transformers."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index.name} names the file {name!r}; allowed: plain *.safetensors names")
            if not (directory / name).is_file():
                raise ValueError(f"{index.name} names {name}, which is not there")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickled[0]} is pickled and is never opened: convert it to safetensors" if pickled else ""
        raise ValueError(f"{directory} has no *.safetensors{hint}")
    return files


def save(checkpoint: Checkpoint, directory: str | Path) -> None:
    """Write a directory that transformers reads: safetensors in the tensors' own dtypes, config, tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    checked = ModelTensors(checkpoint.config, checkpoint.tensors)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in checked.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf = checkpoint.config.to_hf() | {"torch_dtype": str(next(iter(tensors.values())).dtype)}
    (directory / "config.json").write_text(json.dumps(hf, indent=2))
    generation = {"bos_token_id": hf["bos_token_id"], "eos_token_id": hf["eos_token_id"]}
    (directory / GENERATION_FILE).write_text(json.dumps(generation))
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(directory)
