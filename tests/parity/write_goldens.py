"""Script that writes tests/golden/parity.npz from transformers and peft: `python -m tests.parity.write_goldens`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tests import reference_models as reference
from tests.parity import torch_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "parity.npz"
TOKENS = 64


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in reference.CONFIGS.items():
            directory = reference.save_model(Path(folder) / name, name)
            model = torch_reference.load(directory)
            arrays[f"{name}/tokens"] = np.array(torch_reference.greedy(model, reference.prompt(1), TOKENS), np.int32)
            arrays[f"{name}/logits"] = torch_reference.logits(model, reference.prompt(1)).astype(np.float32)
            if name != "gqa":
                continue
            for adapter, path in reference.save_adapters(Path(folder) / "adapters", config).items():
                adapted = torch_reference.with_adapter(directory, path)
                tokens = torch_reference.greedy(adapted, reference.prompt(2), TOKENS)
                arrays[f"gqa/{adapter}/tokens"] = np.array(tokens, np.int32)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"wrote {GOLDEN.name}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
